"""Walking through the tree that a config is."""

from mmengine.config import ConfigDict

from bcn_mm.convert import children, walk


def test_every_dict_comes_once_outer_ones_first():
    inner = dict(type='A', norm_cfg=dict(type='BN'))
    model = ConfigDict(neck=None, heads=[inner, (inner,)], backbone=inner)
    assert [name for name, _ in walk(model, 'model')] == [
        'model',
        'model.heads.0',
        'model.heads.0.norm_cfg',
        'model.heads.1.0',
        'model.heads.1.0.norm_cfg',
        'model.backbone',
        'model.backbone.norm_cfg',
    ]
    for name, node in walk(model):
        value = model
        for word in filter(None, name.split('.')):
            value = value[int(word) if word.isdigit() else word]
        assert value == node
    assert not list(walk('BN')) and not list(children('BN'))


def test_a_dict_may_change_when_it_comes():
    model = dict(a=dict(old=dict(b=1)), c=[dict(old=dict())])
    names = []
    for name, node in walk(model):
        names.append(name)
        if 'old' in node:
            node['new'] = node.pop('old')
    assert names == ['', 'a', 'a.new', 'c.0', 'c.0.new']
