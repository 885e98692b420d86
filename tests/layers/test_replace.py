"""Norms that components build without asking their config."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from support.norms import Block
from torch import nn

from bcn_mm import BCN, replace_norms
from bcn_mm.layers import is_replaceable


def test_layers_that_are_no_batch_or_group_norm():
    kinds = {nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm}
    assert all(map(is_replaceable, kinds))
    for kind in (nn.LayerNorm, nn.InstanceNorm2d, nn.Conv2d, BCN, None):
        assert not is_replaceable(kind)


def test_replaces_in_place_and_nothing_else():
    block = Block().eval()
    others = [*block.other]
    assert replace_norms(block) is block
    assert isinstance(block.shared, BCN) and block.more[0] is block.shared
    assert isinstance(block.more[1], BCN) and block.more[1].num_groups == 2
    assert [*block.other] == others
    assert not block.shared.training
    block(torch.randn(1, 3, 4, 4)).sum().backward()
    again = list(block.modules())
    replace_norms(block)
    assert list(block.modules()) == again


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_with_bcn_builds_the_component(device):
    cfg = dict(
        type='DilatedEncoder',
        in_channels=16,
        out_channels=16,
        block_mid_channels=8,
        num_residual_blocks=2,
        block_dilations=[2, 4],
    )
    with torch.device(device), DefaultScope.overwrite_default_scope('mmdet'):
        stock = MODELS.build(cfg)
        cfg.update(type='WithBCN', component=cfg['type'])
        neck = MODELS.build(dict(cfg, bcn_cfg=dict(type='BCN', momentum=0.2)))
    assert type(neck) is type(stock)
    replaced = 0
    for name, layer in stock.named_modules():
        own = neck.get_submodule(name)
        if is_replaceable(type(layer)):
            replaced += 1
            assert isinstance(own, BCN) and own.momentum == 0.2
            assert own.weight.device.type == device
        else:
            assert type(own) is type(layer)
    assert replaced == 8
    if device == 'cpu':
        neck.init_weights()
        (out,) = neck([torch.randn(1, 16, 6, 6)])
        out.sum().backward()


def random_tree(choose, pool, depth=0):
    """A module of modules, with norms of a pool at random places."""
    names = [f'm{i}' for i in range(choose.randint(1, 4))]
    children = [
        choose.choice(pool)
        if depth == 3 or choose.random() < 0.6
        else random_tree(choose, pool, depth + 1)
        for _ in names
    ]
    kind = choose.choice(['list', 'dict', 'sequential', 'attributes'])
    if kind == 'list':
        return nn.ModuleList(children)
    if kind == 'sequential':
        return nn.Sequential(*children)
    if kind == 'dict':
        return nn.ModuleDict(zip(names, children))
    parent = nn.Module()
    for name, child in zip(names, children):
        setattr(parent, name, child)
    return parent


@given(st.integers(0, 10**6))
def test_all_names_of_a_norm_are_those_of_one_layer(seed):
    choose = random.Random(seed)
    pool = [
        nn.BatchNorm2d(8),
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.LayerNorm(8),
        nn.BatchNorm2d(8),
        nn.Identity(),
        None,
    ]
    tree = random_tree(choose, pool)
    before = dict(tree.named_modules(remove_duplicate=False))
    replace_norms(tree)
    after = dict(tree.named_modules(remove_duplicate=False))
    assert list(after) == list(before)
    pairs = set()
    for name, old in before.items():
        if is_replaceable(type(old)):
            assert isinstance(after[name], BCN), name
            pairs.add((old, after[name]))
        else:
            assert after[name] is old, name
    for side in zip(*pairs):  # one to one
        assert len(set(side)) == len(pairs)


@pytest.mark.parametrize(
    'kind', [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d]
)
@pytest.mark.parametrize('affine', [False, True])
def test_lazy_norms_need_a_pass_first(kind, affine):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(kind(affine=affine)))
    before = list(net.modules())
    with pytest.raises(ValueError, match=rf'1\.0 is a {kind.__name__}.*pass'):
        replace_norms(net)
    assert list(net.modules()) == before
    dims = int(kind.__name__[-2])
    net[1](torch.randn(2, 4, *[3] * dims))
    assert isinstance(replace_norms(net)[1][0], BCN)


def test_an_error_changes_nothing():
    net = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(6))
    before = list(net.modules())
    with pytest.raises(ValueError, match='num_groups'):
        replace_norms(net, dict(type='BCN', num_groups=4))
    assert list(net.modules()) == before
