"""The op is its definition, whichever backend makes the passes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.operands import AFFINE, LAYOUTS, MODES, channels_last, operands
from torch.autograd import gradcheck

from bcn_mm.ops import batch_channel_norm, default_num_groups


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    depth=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 4), max_size=3),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    last=st.booleans(),
    training=st.booleans(),
    estimate=st.booleans(),
    momentum=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_definition(
    backend,
    n,
    groups,
    depth,
    spatial,
    offset,
    last,
    training,
    estimate,
    momentum,
    seed,
):
    torch.manual_seed(seed)
    channels = groups * depth
    given = operands(channels, groups)
    mode = dict(training=training, estimate=estimate, momentum=momentum)
    mean, var = given['running_mean'], given['running_var']
    leaves = [given[k].requires_grad_() for k in AFFINE]
    for _ in range(3):
        x = torch.randn(n, channels, *spatial, dtype=torch.double)
        x = x + offset * torch.randn(1, channels, *[1] * len(spatial))
        x = channels_last(x) if last else x
        x.requires_grad_()
        want, mean, var = reference.bcn(x, groups, mean, var, *leaves, **mode)
        got = batch_channel_norm(x, groups, **given, **mode)
        assert got.shape == x.shape and got.dtype == x.dtype
        assert got.stride() == torch.empty_like(x).stride()
        # the definition itself is as ill-conditioned as the input is large
        size = max(1.0, x.abs().max().item())
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * size)
        torch.testing.assert_close(
            (given['running_mean'], given['running_var']),
            (mean, var),
            rtol=1e-10,
            atol=1e-10,
        )
        dy = torch.randn_like(x)
        # where a variance is zero the true gradient is too, and what is left
        # is rounding, amplified by 1 / eps
        slack = 1e-10 if n * depth * x[0, 0].numel() > 1 else 1e-6
        single = not estimate and training and n * x[0, 0].numel() == 1
        slack = 1e-6 if single else slack
        for a, b in zip(
            torch.autograd.grad(got, [x, *leaves], dy),
            torch.autograd.grad(want, [x, *leaves], dy),
        ):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=1e-10, atol=slack * scale * size)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradcheck(backend, mode, layout):
    groups, x = 2, layout(torch.randn(2, 6, 2, 3, dtype=torch.double))
    given = operands(6, groups)
    mean, var = given.pop('running_mean'), given.pop('running_var')

    def function(x, *affines):
        # momentum 0: with estimates that move, a numerical derivative would
        # see them move, and autograd by definition does not
        return batch_channel_norm(
            x,
            groups,
            mean.clone(),
            var.clone(),
            *affines,
            momentum=0.0,
            **mode,
        )

    assert gradcheck(
        function,
        (x.requires_grad_(), *(p.requires_grad_() for p in given.values())),
    )


def test_large_batch_mode_is_batch_norm_then_group_norm(backend):
    """...running statistics included, with unbiased variance as there."""
    bn = torch.nn.BatchNorm2d(8)
    mean, var = torch.zeros(8), torch.ones(8)
    for training in (True, True, False):
        bn.train(training)
        x = torch.randn(4, 8, 5, 5) * 2 + 3
        got = batch_channel_norm(
            x,
            2,
            mean,
            var,
            training=training,
            estimate=False,
            momentum=0.1,
        )
        torch.testing.assert_close(got, F.group_norm(bn(x), 2))
        torch.testing.assert_close(mean, bn.running_mean)
        torch.testing.assert_close(var, bn.running_var)


@pytest.mark.parametrize('mode', MODES)
def test_one_channel_per_group_is_instance_norm(backend, mode):
    """Any batch stage is undone by groups of one, up to eps."""
    x = torch.randn(3, 4, 16, 16, dtype=torch.double)
    given = operands(4, 4)
    given['weight'].fill_(1)
    given['bias'].fill_(0)
    got = batch_channel_norm(x, 4, **given, **mode)
    torch.testing.assert_close(got, F.instance_norm(x), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 4]))
def test_channel_stage_statistics(backend, seed, groups):
    """Each group of each sample leaves with mean bias and deviation weight."""
    torch.manual_seed(seed)
    given = operands(8, groups)
    y = batch_channel_norm(
        torch.randn(2, 8, 6, 6, dtype=torch.double),
        groups,
        **given,
        training=True,
    ).reshape(2, groups, -1)
    mean, std = y.mean(2), y.std(2, unbiased=False)
    torch.testing.assert_close(mean, given['bias'].expand(2, -1))
    torch.testing.assert_close(std, given['weight'].expand(2, -1), rtol=1e-3, atol=0)


@pytest.mark.parametrize('training', [True, False])
def test_samples_do_not_see_each_other(backend, training):
    """Micro-batch BCN: permuting a batch permutes its result."""
    x = torch.randn(5, 6, 3, 3, dtype=torch.double)
    order = torch.randperm(5)
    given = operands(6, 2)

    def call(x):
        own = {k: v.clone() for k, v in given.items()}
        return batch_channel_norm(x, 2, **own, training=training)

    torch.testing.assert_close(call(x)[order], call(x[order]))


@pytest.mark.parametrize('mode', MODES)
def test_kept_for_backward(backend, mode):
    """The input once, at most four values per (sample, channel) beside it."""
    x = torch.randn(1, 64, 20, 30, requires_grad=True)
    given = operands(64, 32, torch.float)
    parameters = {given[k].requires_grad_().data_ptr() for k in AFFINE}
    kept = {}

    def pack(t):
        if t.data_ptr() not in parameters:  # held by the module anyway
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_channel_norm(x, 32, **given, **mode)
    assert kept.pop(x.data_ptr()) == x.numel()
    assert sum(kept.values()) <= 4 * 64


def test_backward_twice_is_refused():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    y = batch_channel_norm(x, 2, torch.zeros(4), torch.ones(4))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize(
    'channels, groups',
    [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (18, 2),
        (24, 8),
        (32, 16),
        (64, 32),
        (72, 8),
        (96, 32),
        (2048, 32),
    ],
)
def test_default_num_groups(channels, groups):
    assert default_num_groups(channels) == groups


@given(channels=st.integers(1, 4096))
def test_default_num_groups_is_the_largest_that_qualifies(channels):
    best = max(
        (
            g
            for g in range(1, 33)
            if 32 % g == 0 and channels % g == 0 and channels // g >= 2
        ),
        default=1,
    )
    assert default_num_groups(channels) == best


@pytest.mark.parametrize(
    'shape, groups, message',
    [
        ((4,), 2, r'2 to 5 dimensions.*\(4,\)'),
        ((1, 4, 1, 1, 1, 1), 2, '2 to 5 dimensions'),
        ((1, 6, 2, 2), 2, r'expected 4 channels.*\(1, 6, 2, 2\)'),
        ((1, 4, 2, 2), 3, 'num_groups=3 does not divide 4'),
        ((1, 4, 2, 2), 0, 'num_groups=0 does not divide 4'),
    ],
)
def test_bad_input(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        batch_channel_norm(torch.randn(shape), groups, torch.zeros(4), torch.ones(4))
