"""Checkpoints that a config starts from, and stages that it freezes."""

import functools

import pytest
import torch
from support.stock_configs import DEEPLAB, RETINA, STOCK, model_of

from bcn_mm.convert import read_config, to_bcn
from bcn_mm.errors import InputError


def settings(source, **kwargs):
    changes = []
    cfg = to_bcn(read_config(source), changes=changes, **kwargs)
    return cfg, {c.path: c for c in changes}


def test_checkpoints_that_fit_stay():
    cfg, changes = settings(RETINA)
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    assert 'batch stage' in changes['model.backbone.init_cfg'].note
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


NO_CHECKPOINT = {'model.backbone.init_cfg': None}
LOADED = dict(NO_CHECKPOINT, load_from='x.pth')
FROZEN = {'model.backbone.frozen_stages': 1}


@pytest.mark.parametrize(
    'source, edit, kwargs, stays',
    [
        (RETINA, {}, {}, True),
        (RETINA, {}, dict(ws=True), False),
        (RETINA, NO_CHECKPOINT, {}, False),
        (RETINA, LOADED, {}, True),
        (RETINA, LOADED, dict(ws=True), False),
        (
            RETINA,
            {'model.backbone.norm_cfg': dict(type='GN', num_groups=32)},
            {},
            False,
        ),
        # which the model names, not its backbone
        (DEEPLAB, FROZEN, {}, True),
        (DEEPLAB, dict(FROZEN, **{'model.pretrained': None}), {}, False),
    ],
)
def test_stages_stay_frozen_where_weights_of_batch_norm_stay(
    source, edit, kwargs, stays
):
    cfg = read_config(source)
    cfg.merge_from_dict(edit)
    changes = []
    cfg = to_bcn(cfg, changes=changes, **kwargs)
    assert cfg.model.backbone.frozen_stages == (1 if stays else -1)
    assert not cfg.model.backbone.norm_eval
    (note,) = (c.note for c in changes if c.path == 'model.backbone.frozen_stages')
    assert ('BatchNorm' in note) == stays
    assert to_bcn(cfg, **kwargs).to_dict() == cfg.to_dict()


@pytest.mark.parametrize('source', [RETINA, DEEPLAB])
def test_standardizing_afterwards_is_the_same(source):
    later = to_bcn(to_bcn(read_config(source)), ws=True)
    assert later.to_dict() == to_bcn(read_config(source), ws=True).to_dict()


def test_pretrained_bcn_weights(tmp_path):
    """They are loaded, and what the stock config freezes stays frozen."""
    source = read_config(STOCK['names its norm'])
    source.model.backbone.update(depth=18, init_cfg=None)
    source.model.neck.in_channels = [64, 128, 256, 512]
    donor = model_of(to_bcn(source, ws=True), 'cpu')
    for p in donor.parameters():
        p.data.normal_()
    path = tmp_path / 'ours.pth'
    torch.save(dict(state_dict=donor.state_dict()), path)
    cfg = to_bcn(source, ws=True, pretrained=str(path))
    assert cfg.model.backbone.frozen_stages == 1
    assert not cfg.model.backbone.norm_eval
    model = model_of(cfg, 'cpu')
    model.init_weights()
    for name, value in donor.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    again = to_bcn(cfg, ws=True, pretrained=str(path))
    assert again.to_dict() == cfg.to_dict()
    assert to_bcn(cfg, ws=True).to_dict() == cfg.to_dict()
    cfg = to_bcn(read_config(DEEPLAB), pretrained='https://some.where/x.pth')
    assert cfg.model.pretrained is None
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('x.pth')


@pytest.mark.parametrize('dialect', ['std', 'var'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_pretrained_weights_know_their_dialect(dialect, prefix, tmp_path):
    source = read_config(STOCK['names its norm'])
    source.model.backbone.update(depth=18, init_cfg=None)
    source.model.neck.in_channels = [64, 128, 256, 512]
    given = to_bcn(source, ws=True)
    given.model.backbone.conv_cfg.dialect = dialect
    donor = model_of(given, 'cpu')
    path = tmp_path / 'a.pth'
    torch.save((donor if prefix else donor.backbone).state_dict(), path)
    cfg = to_bcn(source, ws=True, pretrained=str(path))
    assert cfg.model.backbone.conv_cfg.dialect == dialect
    assert to_bcn(cfg, ws=True, pretrained=str(path)).to_dict() == cfg.to_dict()
    model = model_of(cfg, 'cpu')
    model.init_weights()
    assert model.backbone.conv1.dialect == dialect
    with pytest.raises(InputError, match=f"a.pth .*'{dialect}'.*--ws"):
        to_bcn(source, pretrained=str(path))


@functools.lru_cache(maxsize=None)
def bad_checkpoints():
    source = read_config(STOCK['names its norm'])
    source.model.backbone.update(init_cfg=None)
    deep = model_of(to_bcn(source), 'cpu').backbone.state_dict()
    plain = model_of(source, 'cpu').backbone.state_dict()
    return {
        'another depth': (deep, r'another backbone: layer\d.* absent|conv1'),
        'BatchNorm': (plain, r'trained with BatchNorm \(bn1\)'),
        'nothing of it': ({'a': torch.ones(1)}, 'another backbone'),
    }


@pytest.mark.parametrize('kind', ['another depth', 'BatchNorm', 'nothing of it'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_pretrained_weights_of_others(kind, prefix, tmp_path):
    state, message = bad_checkpoints()[kind]
    path = tmp_path / 'a.pth'
    torch.save({prefix + k: v for k, v in state.items()}, path)
    source = read_config(STOCK['names its norm'])
    if kind == 'another depth':
        source.model.backbone.depth = 101
    with pytest.raises(InputError, match=f'a.pth .*{message}'):
        to_bcn(source, pretrained=str(path))


def test_pretrained_that_is_missing():
    with pytest.raises(InputError, match='gone.pth does not exist'):
        to_bcn(read_config(RETINA), pretrained='gone.pth')
