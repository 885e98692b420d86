"""The shipped configs say what their names say."""

import importlib
import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import get_external_models
from support import authors
from support.recipes import CONFIGS, NORMS, load, norm_of
from torch import nn

from bcn_mm import BCN, WSConv2d
from bcn_mm.convert.tree import walk

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_builds_as_it_says(path):
    cfg = load(path)
    init_default_scope(cfg.default_scope)
    module = importlib.import_module(f'{cfg.default_scope}.registry')
    # mmpretrain's backbones read values while they are built
    with torch.device('cpu' if path.parent.name == 'resnet' else 'meta'):
        model = module.MODELS.build(cfg.model)
    said = norm_of(path)
    norm, conv = NORMS[said]
    if path.parent.name == 'quickstart':
        batch = 1
    else:
        batch = int(re.search(r'8xb(\d+)', path.stem + '8xb1').group(1))
        assert cfg.auto_scale_lr.base_batch_size == 8 * batch
    assert cfg.train_dataloader.batch_size == batch

    norms = dict(norms_of(model))
    heads = [n for n, m in norms.items() if not n.startswith('backbone.')]
    if said == 'bn-frozen':  # heads have none or GroupNorm
        assert all(type(norms.pop(n)) is nn.GroupNorm for n in heads)
    elif said == 'bn' and path.parent.name == 'quickstart':
        norms = {n: m for n, m in norms.items() if n not in heads}
    assert len(norms) >= 20
    for name, m in norms.items():
        assert isinstance(m, norm), name
        assert isinstance(m, BCN) == (norm is BCN), name
        assert m.affine, name
    if '-all_' in path.stem:
        parts = {n.rsplit('.', 1)[0] for n in norms}
        for part in (
            'backbone',
            'neck',
            'roi_head.bbox_head',
            'roi_head.mask_head',
            'bbox_head',
        ):
            try:
                model.get_submodule(part)
            except AttributeError:
                continue
            assert any(p.startswith(f'{part}.') for p in parts), part

    # no other kind of convolution, except where mmseg has no say in it
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.bias is None:
            separable = 'depthwise_conv' in name or 'pointwise_conv' in name
            assert type(m) is (nn.Conv2d if separable else conv), name

    if any(isinstance(m, BATCH_NORMS) for m in norms.values()):
        norm_eval = cfg.model.backbone.get('norm_eval', False)
        assert norm_eval == (said == 'bn-frozen')
    if path.parent.name in ('retinanet', 'fcos') and norm is BCN:
        levels = {m.num_levels for n, m in norms.items() if 'bbox_head' in n}
        assert levels == {5}
    check_name(path, cfg)
    if said == 'bcn-ws' and path.parent.name != 'quickstart':
        check_start(path, cfg.model.backbone, model)


def check_start(path, said, model):
    """The file that training starts from, of which the backbone is one."""
    convs = [m for m in model.modules() if isinstance(m, WSConv2d)]
    if '-jhu_' in path.stem:
        assert {m.dialect for m in convs} == {'std'}
        check_jhu(said, model.backbone)
        return
    assert {m.dialect for m in convs} == {'var'}
    if path.parent.name in ('resnet', 'cityscapes'):  # their COCO model has it
        assert not said.get('init_cfg')
        return
    x50 = said.type == 'ResNeXt'
    name = f'{"rx" if x50 else "rn"}{said.depth}_bcn_ws_mm.pth'
    assert said.init_cfg == dict(type='Pretrained', checkpoint=f'checkpoints/{name}')
    with torch.device('meta'):
        more = dict(groups=32, base=4) if x50 else {}
        theirs = authors.Backbone(said.depth, **more)
    backbone = model.backbone
    own = {k: v.shape for k, v in backbone.named_parameters()}
    for name, m in theirs.named_modules():
        if isinstance(m, authors.Norm):
            assert own.pop(f'{name}.weight') == (32,)
            assert own.pop(f'{name}.bias') == (32,)
            channels = m.pbn.weight.shape
            assert own.pop(f'{name}.batch_weight') == channels
            assert own.pop(f'{name}.batch_bias') == channels
        elif isinstance(m, authors.Conv):
            assert own.pop(f'{name}.weight') == m.weight.shape
            assert backbone.get_submodule(name).stride == m.stride or dilated(said)
    assert not own


def check_jhu(said, backbone):
    """mmdet's own backbone, in whose layout the recipe's is but for the norms."""
    names = {'ResNet': 'resnet{}_gn_ws', 'ResNeXt': 'resnext{}_32x4d_gn_ws'}
    name = names[said.type].format(said.depth)
    assert f'jhu/{name}' in get_external_models()
    checkpoint = f'open-mmlab://jhu/{name}'
    assert said.init_cfg == dict(type='Pretrained', checkpoint=checkpoint)
    with torch.device('meta'):
        theirs = stock(said)
    own = {k: v.shape for k, v in backbone.named_parameters()}
    for name, value in theirs.named_parameters():
        name = re.sub(r'\bgn(\d)', r'bn\1', name)
        batch_stage = '.batch_'.join(name.rsplit('.', 1))
        assert own.pop(batch_stage if batch_stage in own else name) == value.shape
    assert all(shape == (32,) for shape in own.values())  # of channel stages


def stock(said):
    """A recipe's backbone with GroupNorm and mmcv's ConvWS, as in mmdet's gn+ws."""
    norm_cfg, conv_cfg = dict(type='GN', num_groups=32), dict(type='ConvWS')
    cfg = dict(said, norm_cfg=norm_cfg, conv_cfg=conv_cfg, init_cfg=None)
    return importlib.import_module('mmdet.registry').MODELS.build(cfg)


@pytest.mark.parametrize(
    'path',
    [p for p in CONFIGS if re.match('mask-rcnn_(r|x)50.*-jhu_', p.stem)],
    ids=lambda p: p.stem,
)
def test_starts_by_itself(path, tmp_path, log):
    """From a file in jhu's layout, in the place of what mmengine downloads."""
    said = load(path).model.backbone
    init_default_scope('mmdet')
    theirs = stock(said)
    for m in theirs.modules():
        if isinstance(m, nn.GroupNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / 'jhu.pth')
    said.init_cfg.checkpoint = str(tmp_path / 'jhu.pth')
    own = importlib.import_module('mmdet.registry').MODELS.build(said)
    log.clear()
    own.init_weights()
    assert sum('GroupNorm' in line for line in log) == 1
    assert not any('missing' in line or 'unexpected' in line for line in log)
    for name, m in theirs.named_modules():
        layer = own.get_submodule(re.sub(r'\bgn(\d)', r'bn\1', name))
        if isinstance(m, nn.GroupNorm):
            assert torch.equal(layer.batch_weight, m.weight), name
            assert torch.equal(layer.batch_bias, m.bias), name
        elif isinstance(m, nn.Conv2d):
            assert torch.equal(layer.weight, m.weight), name
            x = torch.randn(1, m.in_channels, 8, 8, dtype=torch.double)
            torch.testing.assert_close(layer.double()(x), m.double()(x))


def dilated(backbone):
    """Stages of a segmenter dilate where ImageNet's have strides."""
    return backbone.get('strides', (1, 2, 2, 2)) != (1, 2, 2, 2)


def check_name(path, cfg):
    """The backbone, schedule and size that a recipe's name says."""
    backbone, name = cfg.model.backbone, path.stem
    depth = re.search(r'(?:[-_][rx]|resnet)(\d+)', name).group(1)
    assert backbone.depth == int(depth)
    assert (backbone.type == 'ResNeXt') == ('_x50' in name)
    if '_coco' in name:
        epochs = {'1x': 12, '2x': 24}[name.split('_')[-2]]
        assert cfg.train_cfg.max_epochs == epochs
        assert cfg.param_scheduler[-1].end == epochs
        assert cfg.param_scheduler[-1].milestones[-1] < epochs
    size = re.search(r'(\d+)x(\d+)$', name)
    if size:
        size = tuple(map(int, size.groups()))
        assert tuple(cfg.model.data_preprocessor.size) == size
        crops = [
            d.crop_size
            for _, d in walk(cfg.train_dataloader)
            if d.get('type') == 'RandomCrop'
        ]
        assert crops and all(tuple(crop) == size for crop in crops)


def norms_of(model):
    for name, m in model.named_modules():
        if isinstance(m, (BATCH_NORMS, nn.GroupNorm)):
            yield name, m


def test_fragments():
    """Each is some recipe's base; none has a model, which the stock bases have."""
    fragments = set((ROOT / 'configs' / '_base_').rglob('*.py'))
    assert fragments
    used = set()
    for path in [*CONFIGS, *fragments]:
        bases = re.findall(r"'(\.[^']+\.py)'", path.read_text())
        used |= {(path.parent / base).resolve() for base in bases}
    assert fragments <= used
    for path in fragments:
        assert 'model' not in Config.fromfile(path)
