"""What a norm was, the BCN in its place is: parameters, statistics, settings."""

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_torch
from mmengine.model.utils import _BatchNormXd
from support.norms import Block, batch_norm
from torch import nn

from bcn_mm import BCN, replace_norms
from bcn_mm.weights.norm_layouts import adopt_batch_norm, adopt_group_norm


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


def test_a_group_norm_as_its_checkpoint_is_loaded():
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = replace_norms(norm)
    want = BCN(8, 4)
    want.load_state_dict(norm.state_dict())
    for name, value in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


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
    'dtype',
    [
        pytest.param(torch.float16, marks=needs_torch(2, 6, 'half convolutions')),
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
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
