"""Norms that components build without asking their config."""

import random
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mmcv.ops import SyncBatchNorm as MMSyncBN
from mmdet.registry import MODELS
from mmengine.model.utils import _BatchNormXd
from mmengine.registry import DefaultScope
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from bcn_mm import BCN, replace_norms
from bcn_mm.layers import is_replaceable
from bcn_mm.weights.layouts import adopt_batch_norm, adopt_group_norm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.shared = nn.BatchNorm2d(8)
        self.more = nn.Sequential(self.shared, nn.GroupNorm(2, 8))
        self.other = nn.ModuleList([nn.LayerNorm(8), nn.InstanceNorm2d(8)])

    def forward(self, x):
        return self.more(self.shared(self.conv(x)))


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


def test_takes_over_what_batch_norm_learnt():
    norm = nn.BatchNorm2d(8)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    nn.init.normal_(norm.weight)
    layer = replace_norms(norm, dict(type='BCN', num_groups=2))
    want = BCN(8, 2)
    want.load_state_dict(norm.state_dict())
    for name, value in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    bare = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
    assert replace_norms(bare).running_mean.eq(0).all()


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


# -- what is shared ----------------------------------------------------------


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


# -- what is taken over ------------------------------------------------------


def batch_norm(kind, channels, **kwargs):
    """One that has learnt something."""
    norm = kind(channels, **kwargs).eval()
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(1e-4, 1.5)
    return norm


KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, _BatchNormXd)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('eps', [1e-8, 1e-5, 1e-3, 0.3])
@pytest.mark.parametrize('groups', [None, 1, 4])
def test_statistics_mean_what_they_meant(kind, eps, groups):
    """The batch stage is the norm; the channel stage has the same eps."""
    norm = batch_norm(kind, 8, eps=eps)
    cfg = dict(type='BCN', num_groups=groups)
    layer = replace_norms(nn.Sequential(norm), cfg)[0]
    assert layer.eps == eps
    shape = (3, 8) if kind is nn.BatchNorm1d else (3, 8, 5, 4)
    x = torch.randn(shape)
    repeats = 8 // layer.num_groups
    want = F.group_norm(
        norm(x),
        layer.num_groups,
        layer.weight.repeat_interleave(repeats),
        layer.bias.repeat_interleave(repeats),
        eps,
    )
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'norm', [nn.BatchNorm2d(8, eps=1e-3), nn.GroupNorm(2, 8, eps=1e-3)]
)
def test_eps_of_the_norm_or_as_norm_cfg_says(norm):
    assert replace_norms(norm).eps == 1e-3
    assert replace_norms(norm, dict(type='BCN', eps=1e-4)).eps == 1e-4
    assert replace_norms(norm).momentum == BCN(8).momentum


def test_a_norm_without_eps():
    assert replace_norms(nn.BatchNorm2d(8, eps=0)).eps == BCN(8).eps


@pytest.mark.parametrize('weight', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(
    'norm', [lambda: nn.BatchNorm2d(8), lambda: nn.GroupNorm(2, 8)]
)
def test_what_was_frozen_stays_frozen(norm, weight, bias):
    norm = norm()
    norm.weight.requires_grad_(weight)
    norm.bias.requires_grad_(bias)
    layer = replace_norms(nn.Sequential(norm))[0]
    trained = {n: p.requires_grad for n, p in layer.named_parameters()}
    assert trained == dict(
        weight=weight, bias=bias, batch_weight=weight, batch_bias=bias
    )
    for choice in (False, True):
        cfg = dict(type='BCN', requires_grad=choice)
        layer = replace_norms(norm, cfg)
        assert all(p.requires_grad is choice for p in layer.parameters())
        assert cfg == dict(type='BCN', requires_grad=choice)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_device_and_dtype(device, dtype):
    block = Block().to(device, dtype)
    block.bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    replace_norms(block)
    kinds = {
        k: (t.device.type, t.dtype)
        for k, t in block.state_dict().items()
        if not k.endswith('num_batches_tracked')
    }
    assert set(kinds.values()) == {(device, dtype)}, kinds
    assert isinstance(block.bare, BCN)
    if device == 'cpu':
        y = block.eval()(torch.randn(1, 3, 4, 4, dtype=dtype))
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('adopt', [adopt_batch_norm, adopt_group_norm])
def test_small_and_large_weights_in_half_precision(dtype, adopt):
    """The channel stage's pair is that of float64, rounded once."""
    for scale in (0, 1e-4, 1e-3, 1.0, 300.0):
        pair = (scale * torch.randn(2, 16)).to(dtype)
        states = []
        for t in (pair, pair.double()):
            state = dict(weight=t[0], bias=t[1])
            adopt(state, '', 4, 1e-5)
            states.append(state)
        for name in ('weight', 'bias'):
            got, want = (state[name] for state in states)
            assert got.dtype == dtype
            torch.testing.assert_close(got, want.to(dtype))


def test_a_group_norm_as_its_checkpoint_is_loaded():
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = replace_norms(norm)
    want = BCN(8, 4)
    want.load_state_dict(norm.state_dict())
    for name, value in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize('tracked', [False, True])
@pytest.mark.parametrize('affine', [False, True])
def test_norms_without_parameters_or_statistics(tracked, affine):
    norm = nn.BatchNorm2d(8, affine=affine, track_running_stats=tracked)
    norm(torch.randn(4, 8, 5, 5) + 1)
    layer = replace_norms(norm.eval())
    assert layer.affine == affine
    assert bool(list(layer.parameters())) == affine
    assert layer.running_mean.any() == tracked
    if tracked:  # and so a checkpoint of the model fits
        layer.load_state_dict(norm.state_dict())
    assert replace_norms(norm, dict(type='BCN', affine=True)).affine
    layer(torch.randn(2, 8, 3, 3))


def test_a_norm_without_a_bias():
    try:
        norm = nn.BatchNorm2d(8, bias=False)
    except TypeError:
        pytest.skip('this torch has no such argument')
    nn.init.uniform_(norm.weight)
    norm.weight.requires_grad_(False)
    layer = replace_norms(norm)
    full = nn.BatchNorm2d(8)
    full.weight.data.copy_(norm.weight)
    for name, value in replace_norms(full).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert not any(p.requires_grad for p in layer.parameters())


def test_statistics_of_unknown_age_are_not_replaced():
    """As when a checkpoint without num_batches_tracked is loaded."""
    norm = nn.BatchNorm2d(8)
    norm.running_mean.fill_(3)
    layer = replace_norms(norm, dict(type='BCN', start='first')).train()
    layer(torch.zeros(1, 8, 2, 2))
    assert layer.running_mean.gt(2.5).all()


def test_hooks_come_along():
    norm, seen = nn.BatchNorm2d(8), []
    handles = [
        norm.register_forward_pre_hook(lambda m, x: seen.append((m, 'pre'))),
        norm.register_forward_hook(
            lambda m, x, k, y: seen.append((m, 'forward')), with_kwargs=True
        ),
        norm.register_full_backward_hook(lambda m, *_: seen.append((m, 'backward'))),
    ]
    layer = replace_norms(nn.Sequential(norm))[0]
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    assert seen == [(layer, k) for k in ('pre', 'forward', 'backward')]
    for handle in handles:
        handle.remove()
    layer(x).sum().backward()
    assert len(seen) == 3


# -- what does more than normalize -------------------------------------------


class NormAct(nn.BatchNorm2d):
    """Made as timm's BatchNormAct2d: the activation is within."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class GroupNormTwice(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class SyncNormAct(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x).relu()


class OtherDefaults(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.03)

    def _check_input_dim(self, x):
        pass


def instance(channels):
    norm = nn.BatchNorm2d(channels)
    norm.forward = lambda x: x
    return norm


def pruned(channels):
    return prune.l1_unstructured(nn.BatchNorm2d(channels), 'weight', 1)


def parametrized(channels):
    return parametrizations.weight_norm(nn.GroupNorm(2, channels), dim=None)


def spectral(channels):
    norm = nn.BatchNorm2d(channels)
    norm.weight = nn.Parameter(torch.ones(channels, 1))
    return spectral_norm(norm)


MORE = [
    NormAct,
    lambda channels: GroupNormTwice(2, channels),
    SyncNormAct,
    instance,
    pruned,
    parametrized,
    spectral,
]


@pytest.mark.parametrize('make', MORE)
def test_norms_that_do_more_stay_and_are_named(make):
    norm = make(8)
    block = nn.ModuleDict(
        dict(
            stem=nn.Sequential(nn.Conv2d(3, 8, 1), norm),
            other=make(8),
            more=nn.BatchNorm2d(8),
        )
    )
    before = block.state_dict()
    with pytest.warns(UserWarning) as said:
        replace_norms(block)
    assert block.stem[1] is norm
    assert isinstance(block.more, BCN)
    (text,) = {str(w.message) for w in said}
    kind = type(norm).__name__
    assert f'2 x {kind} as before (first: stem.1)' in text
    for name, value in block.state_dict().items():
        if 'more' not in name:
            assert value.data_ptr() == before[name].data_ptr()
    with pytest.warns(UserWarning, match='first: the module'):
        assert replace_norms(norm) is norm


def test_norms_within_a_norm_that_stays():
    norm = NormAct(8)
    norm.act = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning):
        replace_norms(norm)
    assert isinstance(norm.act[1], BCN)


@pytest.mark.parametrize(
    'kind', [OtherDefaults, _BatchNormXd, SyncBatchNorm, nn.SyncBatchNorm]
)
def test_subclasses_that_only_normalize(kind):
    assert is_replaceable(kind)
    norm = batch_norm(kind, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer = replace_norms(nn.Sequential(norm))[0]
    assert isinstance(layer, BCN) and layer.eps == norm.eps
    assert torch.equal(layer.batch_weight, norm.weight)


def test_mmcvs_synchronized_norm(tmp_path):
    """It is none of torch's BatchNorms."""
    assert is_replaceable(MMSyncBN)
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        norm = batch_norm(MMSyncBN, 8, eps=1e-3)
    finally:
        dist.destroy_process_group()
    layer = replace_norms(norm)
    assert isinstance(layer, BCN) and layer.eps == 1e-3
    assert torch.equal(layer.running_var, norm.running_var)


def test_classes_that_do_more():
    for kind in (NormAct, GroupNormTwice, SyncNormAct):
        assert not is_replaceable(kind)


# -- errors ------------------------------------------------------------------


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
