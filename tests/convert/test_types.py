"""Names of types, and scopes, in every style of config."""

import pytest
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from torch import nn

from bcn_mm.convert import in_scope, scope_of, type_name


@pytest.mark.parametrize(
    'kind',
    [
        'MaskRCNN',
        'mmdet.MaskRCNN',
        'mmdet.models.MaskRCNN',
        LazyObject('mmdet.models.detectors', 'MaskRCNN'),
        LazyObject('mmdet.models').MaskRCNN,
        dict(type='mmdet.MaskRCNN'),
    ],
)
def test_one_name(kind):
    assert type_name(kind) == 'MaskRCNN'


def test_names_of_objects_and_of_nothing():
    assert type_name(nn.ReLU) == type_name(dict(type=nn.ReLU)) == 'ReLU'
    assert type_name(None) == type_name({}) == type_name(3) == ''


@pytest.mark.parametrize(
    'settings, scope',
    [
        (dict(default_scope='mmseg', model=dict(type='mmdet.MaskRCNN')), 'mmseg'),
        (dict(default_scope=None, model=dict(type='mmdet.MaskRCNN')), 'mmdet'),
        (dict(model=dict(type='MaskRCNN')), None),
        (dict(model=dict(type=nn.ReLU)), 'torch'),
        (dict(model=dict(type='nonesuch.MaskRCNN')), None),
        (dict(), None),
    ],
)
def test_scope(settings, scope):
    assert scope_of(Config(settings)) == scope


def test_scope_of_a_new_style_config(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text(
        'from mmdet.models.detectors import MaskRCNN\n'
        'default_scope = None\n'
        'model = dict(type=MaskRCNN)\n'
    )
    cfg = Config.fromfile(path)
    assert scope_of(cfg) == 'mmdet'
    assert scope_of(Config(cfg.to_dict())) == 'mmdet'  # as a checkpoint holds it
    with in_scope(cfg) as registry:
        assert registry.scope == 'mmdet'
