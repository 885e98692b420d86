"""How far results are from those of float64, next to torch's own norms."""

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operands import AFFINE, LAYOUTS, MODES, operands

from bcn_mm.ops import batch_channel_norm

AUTOCAST = needs_torch(2, 6, 'autocast to float16 on the CPU')


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('ratio', [0, 1, 3, 100])
@pytest.mark.parametrize('shape', [(1, 64, 50, 76), (2, 256, 32, 32), (64, 256, 7, 7)])
def test_float32_error_is_that_of_group_norm(backend, mode, ratio, shape):
    """At most ten times F.group_norm's, against float64, also for offsets."""
    x = torch.randn(shape) + ratio
    dy = torch.randn(shape)
    channels = shape[1]
    start = dict(
        running_mean=torch.full((channels,), float(ratio)),
        running_var=torch.ones(channels),
    )

    def error(function):
        results = []
        for dtype in (torch.float, torch.double):
            leaf = x.to(dtype).requires_grad_()
            y = function(leaf)
            (grad,) = torch.autograd.grad(y, leaf, dy.to(dtype))
            results.append((y.detach().double(), grad.double()))
        return [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(*results)]

    def ours(x):
        own = {k: v.to(x.dtype, copy=True) for k, v in start.items()}
        return batch_channel_norm(x, 32, **own, **mode)

    theirs = error(lambda x: F.group_norm(x, 32))
    for own, other in zip(error(ours), theirs):
        assert own <= 10 * other


def composition(x, groups, mean, var, own, mode):
    """Batch norm, then group norm, as torch has them."""
    batch = mode['training'] and not mode['estimate']
    if batch and x[:, 0].numel() == 1:  # which torch refuses
        z = 0 * own['batch_weight'] + own['batch_bias']
        z = z.view(1, -1, 1) + 0 * x
    else:
        z = F.batch_norm(
            x,
            mean.clone(),
            var.clone(),
            own['batch_weight'],
            own['batch_bias'],
            batch,
        )
    weight, bias = (
        own[k].repeat_interleave(x.shape[1] // groups) for k in ('weight', 'bias')
    )
    return torch.group_norm(z, groups, weight, bias)


@pytest.mark.parametrize('mode', MODES)
@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([1, 1, 2, 25, 400]),
    planes=st.sampled_from(['random', 'constant', 'equal', 'nearly']),
    offset=st.sampled_from([0.0, 0.3, 100.3]),
    scale=st.sampled_from([0.0, 1.0, 10.0]),
    gradient=st.sampled_from(['random', 'constant']),
    seed=st.integers(0, 999),
)
def test_error_is_near_that_of_batch_norm_and_group_norm(
    backend, mode, n, length, planes, offset, scale, gradient, seed
):
    """...in planes with little or no variance too, where 1 / std is large.

    Where a plane varies, its mean is rounded once more than theirs; what that
    may cost is seen by shifting planes by so much. Where a gradient does not
    vary, theirs subtract equal values, and ours products of them, which are
    rounded; what that may cost is seen by rounding the gradient.
    """
    torch.manual_seed(seed)
    groups, channels = 4, 16
    start = operands(channels, groups, torch.float)
    for name in AFFINE:  # all near a special value
        start[name] = float('bias' not in name) + 0.01 * torch.randn_like(start[name])
    shape = n, channels, length
    x = torch.randn(shape)
    if planes == 'constant':
        x = torch.randn(n, channels, 1).expand(shape)
    elif planes == 'equal':
        x = torch.randn(1, channels, 1).expand(shape)
    elif planes == 'nearly':
        x = torch.randn(n, channels, 1) + 1e-3 * x
    x = x * scale + offset
    start['running_mean'] = start['running_mean'] * scale + offset
    dy = torch.randn(shape)
    if gradient == 'constant':
        dy = torch.randn(n, channels, 1).expand(shape)

    def differentiate(function, dtype, x=x, dy=dy):
        leaf = x.to(dtype).requires_grad_()
        own = {k: v.to(dtype, copy=True) for k, v in start.items()}
        leaves = [leaf, *(own[k].requires_grad_() for k in AFFINE)]
        y = function(leaf, own)
        grads = torch.autograd.grad(y, leaves, dy.to(dtype))
        return [t.detach().double() for t in (y, *grads)]

    known = {}

    def ours(x, own):
        mean, var = own.pop('running_mean'), own.pop('running_var')
        y = batch_channel_norm(x, groups, mean, var, **own, **mode)
        known[x.dtype] = mean, var
        return y

    def theirs(x, own):
        return composition(
            x, groups, *(t.to(x.dtype) for t in known[torch.double]), own, mode
        )

    exact = differentiate(ours, torch.double)
    got = differentiate(ours, torch.float)
    composed = differentiate(theirs, torch.float)
    rounded = []
    eps = torch.finfo(x.dtype).eps
    for _ in range(4):  # the signs may cancel
        shifted, pushed = x.double(), dy.double()
        if length > 1 and planes in ('random', 'nearly'):
            ulp = eps * shifted.abs().amax(2, keepdim=True)
            shifted = shifted + ulp * torch.randn(n, channels, 1).sign()
        if length > 1 and gradient == 'constant':
            pushed = pushed * (1 + eps * torch.randn(shape).sign())
        rounded.append(differentiate(theirs, torch.double, shifted, pushed))
    torch.testing.assert_close(  # that it is the same thing
        exact, differentiate(theirs, torch.double), rtol=1e-6, atol=1e-6
    )
    for value, *others in zip(exact, got, composed, *rounded):
        error, allowed, *costs = ((t - value).abs().max().item() for t in others)
        floor = 1e-5 * value.abs().max().item() + 1e-5
        assert error <= 10 * allowed + 2 * max(costs) + floor


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(
    'dtype', [pytest.param(torch.float16, marks=AUTOCAST), torch.bfloat16]
)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_half_precision_is_the_float32_result_rounded(backend, mode, dtype, layout):
    x = layout((torch.randn(2, 8, 9, 9) * 3 + 1).to(dtype))
    dy = torch.randn(2, 8, 9, 9).to(dtype)
    given = operands(8, 2, torch.float)
    results = []
    for leaf in (x, x.float()):
        own = {k: v.clone() for k, v in given.items()}
        leaf = leaf.clone().requires_grad_()
        with torch.autocast('cpu', dtype=dtype):
            y = batch_channel_norm(leaf, 2, **own, **mode)
        assert y.dtype == leaf.dtype
        (grad,) = torch.autograd.grad(y, leaf, dy.to(y.dtype))
        results.append((y.detach(), grad))
    ulp = torch.finfo(dtype).eps
    for low, full in zip(*results):
        # one rounding forward; backward writes twice, so two
        torch.testing.assert_close(
            low.float(), full, rtol=ulp, atol=ulp * full.abs().max().item()
        )
