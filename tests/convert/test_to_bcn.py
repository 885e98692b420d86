"""Stock configs of mmdet and mmsegmentation become BCN configs."""

import copy

import pytest
import torch
from conftest import import_mmpretrain
from mmengine.config import Config, ConfigDict
from support.stock_configs import RETINA, STOCK, model_of, parents

from bcn_mm import BCN, WSConv2d
from bcn_mm.convert import (
    in_scope,
    leftovers,
    part_of,
    read_config,
    to_bcn,
    walk,
    write_config,
)
from bcn_mm.layers import is_replaceable


@pytest.fixture(scope='module', params=STOCK.values(), ids=STOCK)
def given(request):
    """A stock config: its name, what it says, its model."""
    cfg = read_config(request.param)
    return request.param, cfg, model_of(cfg)


@pytest.mark.parametrize('ws', [False, True])
def test_every_norm_becomes_bcn(given, ws, tmp_path):
    source, cfg, stock = given
    before = copy.deepcopy(cfg.to_dict())
    new = to_bcn(cfg, ws=ws)
    assert cfg.to_dict() == before
    model = model_of(new)
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
    for _, node in walk(new.model):
        assert not node.get('norm_eval')
        if ws:
            assert node.get('frozen_stages', -1) == -1
        if ws and 'ws' not in source:
            assert 'checkpoint' not in (node.get('init_cfg') or ())
            assert not node.get('pretrained')


def test_what_is_standardized_is_followed_by_a_norm():
    """A component without norms keeps its convolutions."""
    cfg = to_bcn(read_config(RETINA), ws=True)
    assert cfg.model.backbone.conv_cfg.type == 'WSConv2d'
    assert 'conv_cfg' not in cfg.model.neck
    assert 'conv_cfg' not in cfg.model.bbox_head


@pytest.mark.parametrize(
    'only', [['backbone'], ['heads'], ['neck'], ['backbone', 'heads']]
)
def test_only(only):
    source = STOCK['GroupNorm checkpoint']
    stock, model = model_of(read_config(source)), None
    cfg = to_bcn(read_config(source), only=only)
    model = model_of(cfg)
    where = [n for n, m in stock.named_modules() if is_replaceable(type(m))]
    left = [n for n, m in model.named_modules() if is_replaceable(type(m))]
    assert left == [n for n in where if part_of(n) not in only]
    assert parents(where) == parents(left) + parents(
        n for n, m in model.named_modules() if isinstance(m, BCN)
    )
    assert ('custom_hooks' in cfg) and cfg.custom_imports.imports == ['bcn_mm']


def test_norm_cfg():
    cfg = to_bcn(read_config(RETINA), norm_cfg=dict(type='SyncBCN', num_groups=16))
    layers = [m for m in model_of(cfg).modules() if isinstance(m, BCN)]
    assert layers and all(m.sync and m.num_groups == 16 for m in layers)


def test_norm_cfg_of_what_is_bcn():
    """What it says is taken over, and nothing else is touched."""
    source = read_config(RETINA)
    source.model.backbone.norm_cfg = dict(type='BCN', num_groups=8)
    source.model.bbox_head.norm_cfg = dict(type='BCN', num_levels=5)
    source = to_bcn(source)
    assert to_bcn(source, norm_cfg=dict(type='BCN')).to_dict() == source.to_dict()
    changes = []
    cfg = to_bcn(source, norm_cfg=dict(type='SyncBCN'), changes=changes)
    assert cfg.model.backbone.norm_cfg == dict(type='SyncBCN', num_groups=8)
    assert cfg.model.bbox_head.norm_cfg == dict(type='SyncBCN', num_levels=5)
    assert {c.path for c in changes} >= {'model.backbone.norm_cfg'}
    only = to_bcn(source, norm_cfg=dict(momentum=0.1), only=['heads'])
    head = dict(type='BCN', num_levels=5, momentum=0.1)
    assert only.model.bbox_head.norm_cfg == head
    assert only.model.backbone == source.model.backbone


def test_a_work_dir_is_said_to_stay():
    source, changes = read_config(RETINA), []
    source.work_dir = 'work_dirs/stock'
    cfg = to_bcn(source, changes=changes)
    assert cfg.work_dir == source.work_dir
    (note,) = [c.note for c in changes if c.path == 'work_dir']
    assert '--work-dir' in note


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
    'ShuffleNetV2': lambda: dict(type='mmpretrain.ShuffleNetV2', widen_factor=0.5),
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
