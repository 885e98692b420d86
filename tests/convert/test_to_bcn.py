"""Stock configs of mmdet and mmsegmentation become BCN configs."""

import copy
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import import_mmpretrain
from mmengine.config import Config, ConfigDict

from bcn_mm import BCN, WSConv2d
from bcn_mm.convert import (
    build_model,
    difference,
    in_scope,
    leftovers,
    part_of,
    read_config,
    to_bcn,
    write_config,
)
from bcn_mm.layers import is_replaceable

RETINA = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
DEEPLAB = (
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py'
)
# mmengine finds no config behind `::` in a folder with a plus
ZOO = Path(find_spec('mmdet').origin).parent / '.mim' / 'configs'
# the ways in which configs and components are made
STOCK = {
    'names its norm': RETINA,
    'SyncBN, pretrained beside the backbone': DEEPLAB,
    'by default, in the backbone': 'mmdet::yolo/'
    'yolov3_d53_8xb8-320-273e_coco.py',
    'by default, in the head': 'mmdet::fcos/'
    'fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'GroupNorm checkpoint': 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
    'a list of heads': 'mmdet::cascade_rcnn/'
    'cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'ConvWS': f'{ZOO}/gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py',
    'wrapped': 'mmdet::soft_teacher/'
    'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'GroupNorm and LayerNorm': 'mmdet::mask2former/'
    'mask2former_r50_8xb2-lsj-50e_coco.py',
    'handed over by the component around it': 'mmseg::unet/'
    'unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py',
    'without asking, a neck': 'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'without asking, a backbone': 'mmseg::bisenetv1/'
    'bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py',
}  # fmt: skip


def parents(names):
    """How many layers each module has; ``gn1`` may have become ``bn1``."""
    return Counter(name.rpartition('.')[0] for name in names)


def models(cfg, device='meta'):
    with in_scope(cfg) as registry:
        return build_model(cfg.model, registry, device)


@pytest.mark.parametrize('source', STOCK.values(), ids=STOCK)
@pytest.mark.parametrize('ws', [False, True])
def test_every_norm_becomes_bcn(source, ws, tmp_path):
    cfg = read_config(source)
    before = copy.deepcopy(cfg.to_dict())
    new = to_bcn(cfg, ws=ws)
    assert cfg.to_dict() == before
    stock, model = models(cfg), models(new)
    where = [n for n, m in stock.named_modules() if is_replaceable(type(m))]
    assert where and not leftovers(model)
    assert parents(where) == parents(
        n for n, m in model.named_modules() if isinstance(m, BCN)
    )
    # what is no BatchNorm or GroupNorm is what it was
    for name, layer in stock.named_modules():
        if 'Norm' in type(layer).__name__ and name not in where:
            assert type(model.get_submodule(name)) is type(layer)
    standardized = any(isinstance(m, WSConv2d) for m in model.modules())
    assert standardized == ws
    # once more changes nothing
    assert to_bcn(new, ws=ws).to_dict() == new.to_dict()
    # nor do writing and reading
    path = tmp_path / 'new' / 'config.py'
    write_config(new, source, str(path))
    assert [p.name for p in path.parent.iterdir()] == ['config.py']
    assert Config.fromfile(path).to_dict() == new.to_dict()
    assert len(path.read_text().splitlines()) < 90  # thin
    for node in dicts(new.model):
        assert not node.get('norm_eval')
        assert node.get('frozen_stages', -1) == -1
        if ws and 'ws' not in source:
            assert 'checkpoint' not in (node.get('init_cfg') or ())
            assert not node.get('pretrained')


def dicts(node):
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from dicts(child)


def test_what_is_standardized_is_followed_by_a_norm():
    """A component without norms keeps its convolutions."""
    cfg = to_bcn(read_config(RETINA), ws=True)
    assert cfg.model.backbone.conv_cfg.type == 'WSConv2d'
    assert 'conv_cfg' not in cfg.model.neck
    assert 'conv_cfg' not in cfg.model.bbox_head


# -- checkpoints, frozen stages ----------------------------------------------


def settings(source, **kwargs):
    changes = []
    cfg = to_bcn(read_config(source), changes=changes, **kwargs)
    return cfg, {c.path: c for c in changes}


def test_checkpoints_that_fit_stay():
    cfg, changes = settings(RETINA)
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    assert 'batch stage' in changes['model.backbone.init_cfg'].note
    assert cfg.model.backbone.frozen_stages == -1
    cfg, _ = settings(DEEPLAB)
    assert cfg.model.pretrained == 'open-mmlab://resnet50_v1c'
    # those of GroupNorm, and of standardized convolutions
    for name, ws in (('GroupNorm checkpoint', False), ('ConvWS', True)):
        cfg, changes = settings(STOCK[name], ws=ws)
        assert 'gn' in cfg.model.backbone.init_cfg.checkpoint
        assert 'approximately' in changes['model.backbone.init_cfg'].note


@pytest.mark.parametrize(
    'source, kwargs, key',
    [
        (RETINA, dict(ws=True), 'model.backbone.init_cfg'),
        (DEEPLAB, dict(ws=True), 'model.pretrained'),
        (
            STOCK['GroupNorm checkpoint'],
            dict(ws=True),
            'model.backbone.init_cfg',
        ),
    ],
)
def test_checkpoints_that_do_not_fit_go(source, kwargs, key):
    cfg, changes = settings(source, **kwargs)
    assert changes[key].after is None and changes[key].note
    node = cfg
    for word in key.split('.'):
        node = node[word]
    assert node is None


@pytest.mark.parametrize('source', [RETINA, DEEPLAB])
def test_standardizing_afterwards_is_the_same(source):
    later = to_bcn(to_bcn(read_config(source)), ws=True)
    assert later.to_dict() == to_bcn(read_config(source), ws=True).to_dict()


def test_pretrained_bcn_weights(tmp_path):
    """They are loaded, and what the stock config freezes stays frozen."""
    source = read_config(STOCK['names its norm'])
    source.model.backbone.update(depth=18, init_cfg=None)
    source.model.neck.in_channels = [64, 128, 256, 512]
    donor = models(to_bcn(source, ws=True), 'cpu')
    for p in donor.parameters():
        p.data.normal_()
    path = tmp_path / 'ours.pth'
    torch.save(dict(state_dict=donor.state_dict()), path)
    cfg = to_bcn(source, ws=True, pretrained=str(path))
    assert cfg.model.backbone.frozen_stages == 1
    assert not cfg.model.backbone.norm_eval
    model = models(cfg, 'cpu')
    model.init_weights()
    for name, value in donor.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    again = to_bcn(cfg, ws=True, pretrained=str(path))
    assert again.to_dict() == cfg.to_dict()
    assert to_bcn(cfg, ws=True).to_dict() == cfg.to_dict()
    cfg = to_bcn(read_config(DEEPLAB), pretrained='https://some.where/x.pth')
    assert cfg.model.pretrained is None
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('x.pth')


# -- options -----------------------------------------------------------------


@pytest.mark.parametrize(
    'only', [['backbone'], ['heads'], ['neck'], ['backbone', 'heads']]
)
def test_only(only):
    source = STOCK['GroupNorm checkpoint']
    stock, model = models(read_config(source)), None
    cfg = to_bcn(read_config(source), only=only)
    model = models(cfg)
    where = [n for n, m in stock.named_modules() if is_replaceable(type(m))]
    left = [n for n, m in model.named_modules() if is_replaceable(type(m))]
    assert left == [n for n in where if part_of(n) not in only]
    assert parents(where) == parents(left) + parents(
        n for n, m in model.named_modules() if isinstance(m, BCN)
    )
    assert ('custom_hooks' in cfg) and cfg.custom_imports.imports == ['bcn_mm']


def test_batch_size():
    cfg = to_bcn(read_config(RETINA), batch_size=1)
    stock = read_config(RETINA)
    assert cfg.train_dataloader.batch_size == 1
    assert (
        cfg.optim_wrapper.optimizer.lr == stock.optim_wrapper.optimizer.lr / 2
    )
    assert cfg.auto_scale_lr.base_batch_size == 8
    assert to_bcn(cfg, batch_size=1).to_dict() == cfg.to_dict()
    back = to_bcn(cfg, batch_size=2)
    assert back.optim_wrapper == stock.optim_wrapper
    poly = to_bcn(read_config(DEEPLAB), batch_size=1)
    assert poly.param_scheduler[0].eta_min == 1e-4 / 2


def test_norm_cfg():
    cfg = to_bcn(
        read_config(RETINA), norm_cfg=dict(type='SyncBCN', num_groups=16)
    )
    layers = [m for m in models(cfg).modules() if isinstance(m, BCN)]
    assert layers and all(m.sync and m.num_groups == 16 for m in layers)


def test_what_the_config_has_is_kept():
    cfg = read_config(RETINA)
    cfg.custom_imports = dict(imports=['mmdet.models'])
    cfg.custom_hooks = [ConfigDict(type='EMAHook')]
    cfg = to_bcn(cfg)
    assert cfg.custom_imports.imports == ['mmdet.models', 'bcn_mm']
    kinds = [hook.type for hook in cfg.custom_hooks]
    assert kinds == ['EMAHook', 'SyncEstimatesHook']


def test_nothing_to_replace_changes_nothing():
    cfg = read_config('mmdet::rpn/rpn_r50_fpn_1x_coco.py')
    cfg.model.backbone = dict(type='PyramidVisionTransformer')
    changes = []
    assert to_bcn(cfg, changes=changes).to_dict() == cfg.to_dict()
    assert all(c.before == c.after for c in changes)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(only=['head']), 'unknown part head; choose among backbone'),
        (dict(batch_size=0), 'batch_size must be positive'),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        to_bcn(read_config(RETINA), **kwargs)


def test_errors_of_configs():
    with pytest.raises(ValueError, match='no model'):
        to_bcn(Config(dict(a=1)))
    cfg = read_config(RETINA)
    cfg.pop('train_dataloader')
    with pytest.raises(ValueError, match='no train_dataloader'):
        to_bcn(cfg, batch_size=1)
    for source in ('gone.py', 'mmdet::fcos/gone.py', 'nonesuch::a/b.py'):
        with pytest.raises(FileNotFoundError, match=source.split('/')[-1]):
            read_config(source)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('a = 1\n')
    cfg = to_bcn(read_config(RETINA))
    cfg.model.backbone.depth = object()  # cannot be written
    with pytest.raises(Exception):  # noqa: B017
        write_config(cfg, RETINA, str(path))
    assert path.read_text() == 'a = 1\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'base, new',
    [
        (dict(a=1, b=dict(c=1)), dict(a=1, b=dict(c=1))),
        (dict(a=1, b=dict(c=1, d=2)), dict(a=2, b=dict(d=2))),
        (dict(b=[1]), dict(b=dict(c=1))),
        (dict(b=None), dict(b=dict(c=1))),
        (dict(b=dict(c=1)), dict(b=None, e=dict(f=dict(g=1)))),
        (dict(b=[dict(c=1), dict(d=1)]), dict(b=[dict(c=1), dict(d=2)])),
        (dict(b=dict(c=dict(d=1))), dict(b=dict(c=dict(e=1), f=1))),
    ],
)
def test_a_difference_merged_gives_the_new(base, new):
    merged = Config._merge_a_into_b(difference(base, new), base)
    assert merged == new


# -- heads that pyramid levels share -----------------------------------------

LEVELS = {
    RETINA: None,  # no norm in its head
    'mmdet::atss/atss_r50_fpn_1x_coco.py': 5,
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py': 5,
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 5,
    'mmdet::vfnet/vfnet_r50_fpn_1x_coco.py': 5,
    'mmdet::solov2/solov2_r50_fpn_1x_coco.py': 5,
    # a norm, or a convolution and a norm, for each level
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': None,
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': None,
    'mmdet::nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py': None,
    # regions of all levels in one batch
    'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py': None,
}


@pytest.mark.parametrize('source', LEVELS)
def test_levels_are_as_many_as_share_a_layer(source):
    cfg = to_bcn(read_config(source))
    model = models(cfg, 'cpu').eval()
    calls = defaultdict(int)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BCN)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    with torch.no_grad():
        features = model.extract_feat(torch.zeros(1, 3, 128, 160))
        for name in ('bbox_head', 'mask_head'):
            if getattr(model, name, None) is not None:
                getattr(model, name)(features)
    for name, layer in layers.items():
        assert layer.num_levels == calls.get(name, 1), name
    found = {m.num_levels for m in layers.values()} - {1}
    assert found == ({LEVELS[source]} if LEVELS[source] else set())


# -- what the norms are like -------------------------------------------------

EPS = {
    RETINA,
    STOCK['by default, in the backbone'],
    STOCK['without asking, a neck'],
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py',
    'mmseg::mobilenet_v3/'
    'mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py',
}


@pytest.mark.parametrize('source', sorted(EPS))
def test_eps_is_that_of_the_stock_model(source):
    stock = models(read_config(source), None)
    model = models(to_bcn(read_config(source)), None)
    want = [m.eps for m in stock.modules() if is_replaceable(type(m))]
    found = [m.eps for m in model.modules() if isinstance(m, BCN)]
    assert found == want
    cfg = to_bcn(read_config(source), dict(type='BCN', eps=2e-5))
    again = models(cfg, None)
    assert {m.eps for m in again.modules() if isinstance(m, BCN)} == {2e-5}


@pytest.mark.parametrize('eps', [1e-3, 1e-5, 2e-4])
@pytest.mark.parametrize(
    'norm', [dict(type='BN'), dict(type='SyncBN'),
             dict(type='GN', num_groups=16)]
)  # fmt: skip
def test_eps_and_affine_that_a_config_gives(norm, eps):
    def convert(**more):
        cfg = read_config(RETINA)
        cfg.model.backbone.norm_cfg = dict(norm, **more)
        changes = []
        cfg = to_bcn(cfg, changes=changes)
        path = 'model.backbone.norm_cfg'
        (change,) = (c for c in changes if c.path == path)
        assert change.after == cfg.model.backbone.norm_cfg
        return change

    change = convert(eps=eps, requires_grad=False)
    assert change.after.eps == eps and 'eps' in change.note
    assert 'requires_grad' not in change.after
    # as nas_fcos has it; BCN cannot
    assert 'eps' not in convert(eps=0).after
    change = convert()
    assert 'eps' not in change.after and 'eps' not in change.note
    if norm['type'] != 'GN':
        assert convert(affine=False).after.affine is False


def test_stock_weights_mean_the_same():
    """A BCN with them is the stock norm and a group norm."""
    cfg = read_config('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')
    stock, model = (models(c, 'cpu').eval() for c in (cfg, to_bcn(cfg)))
    state = stock.state_dict()
    for name, value in state.items():
        if name.endswith('running_var'):
            value.uniform_(1e-4, 1e-2)  # where eps matters
    model.load_state_dict(state)
    x = torch.randn(1, 24, 6, 6)
    pair = [m.backbone.stem.conv.bn for m in (stock, model)]
    groups = pair[1].num_groups
    want = torch.nn.functional.group_norm(
        pair[0](x),
        groups,
        pair[1].weight.repeat_interleave(24 // groups),
        pair[1].bias.repeat_interleave(24 // groups),
        pair[0].eps,
    )
    torch.testing.assert_close(pair[1](x), want)


def test_mmcvs_synchronized_norm_is_converted():
    cfg = read_config(
        'mmdet::strong_baselines/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_'
        'syncbn-all_lsj-100e_coco.py'
    )
    kinds = [node.get('type') for node in dicts(to_bcn(cfg).model)]
    assert 'MMSyncBN' in {node.get('type') for node in dicts(cfg.model)}
    assert 'MMSyncBN' not in kinds and kinds.count('BCN') == 4


class NormAct(torch.nn.BatchNorm2d):
    """Does more than normalize."""

    def forward(self, x):
        return super().forward(x).relu()


class Mixed(torch.nn.Module):
    """A backbone that builds its norms without asking."""

    def __init__(self, norm_cfg=None):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), NormAct(8), torch.nn.BatchNorm2d(8),
            NormAct(8),
        )  # fmt: skip

    def forward(self, x):
        return (self.stem(x),)


@pytest.mark.parametrize('norm_cfg', [None, dict(type=NormAct)])
def test_norms_that_do_more_stay_and_are_said(norm_cfg):
    cfg = read_config(RETINA)
    cfg.model.backbone = dict(type=Mixed, norm_cfg=norm_cfg)
    cfg.model.neck = None
    changes = []
    new = to_bcn(cfg, changes=changes)
    kept = {c.path: c for c in changes if c.before == c.after}
    assert kept['model.backbone'].before == '2 x NormAct'
    assert 'more than normalize' in kept['model.backbone'].note
    if norm_cfg:
        assert new.model.backbone.norm_cfg == norm_cfg
        note = kept['model.backbone.norm_cfg'].note
        assert 'NormAct' in note and 'more than normalize' in note
    model = models(new, 'cpu')
    kinds = [type(m).__name__ for m in model.backbone.stem]
    assert kinds == ['Conv2d', 'NormAct', 'BCN', 'NormAct']
    assert not leftovers(model)
    assert to_bcn(new).to_dict() == new.to_dict()


# -- channel counts that 32 does not divide ----------------------------------


def hrnet_w18():
    cfg = read_config('mmdet::hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py')
    return cfg.model.backbone


BACKBONES = {
    'HRNet W18': lambda: hrnet_w18(),
    'MobileNetV2': lambda: dict(type='MobileNetV2', out_indices=(2, 4, 6)),
    'EfficientNet': lambda: dict(type='EfficientNet', arch='b0'),
    'RegNet': lambda: dict(type='RegNet', arch='regnetx_3.2gf'),
    'Res2Net': lambda: dict(type='Res2Net', depth=50, scales=4, base_width=26),
    'ShuffleNetV2': lambda: dict(
        type='mmpretrain.ShuffleNetV2', widen_factor=0.5
    ),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_any_channel_count_without_choosing_groups(name):
    """A step in training, one picture, no setting but the norm's type."""
    backbone = BACKBONES[name]()
    if backbone['type'].startswith('mmpretrain'):
        import_mmpretrain()
    cfg = to_bcn(
        Config(
            dict(
                default_scope='mmdet',
                model=dict(type='SingleStageDetector', backbone=backbone),
            )
        )
    )
    with in_scope(cfg) as registry:
        net = registry.build(cfg.model.backbone)
    net.train()
    layers = [m for m in net.modules() if isinstance(m, BCN)]
    assert layers and not leftovers(net)
    assert any(m.num_channels % 32 for m in layers)
    assert all(m.num_channels // m.num_groups >= 2 for m in layers)
    outs = net(torch.randn(1, 3, 64, 96))
    sum(out.square().mean() for out in outs).backward()
    for p in net.parameters():
        assert p.grad is None or torch.isfinite(p.grad).all()
    assert all(m.running_mean.abs().max() > 0 for m in layers)
