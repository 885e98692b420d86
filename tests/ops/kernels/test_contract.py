"""The laws of bcn_mm/ops/kernels/README.md, for every backend there is.

A backend comes under all of them by being in ``BACKENDS``. The measure is the
definition of reference.py in float64.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.operands import LAYOUTS

from bcn_mm.ops import stages
from bcn_mm.ops.estimates import Rule, Running
from bcn_mm.ops.kernels import BACKENDS, eager, kernels_for, native
from bcn_mm.ops.stages import Affine, Batch, Moments, Spec

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# the mean of values that vary by 1: as far from 0 as the dtype tells them apart
FAR = {
    torch.float64: 1e4,
    torch.float32: 1e4,
    torch.float16: 100.0,
    torch.bfloat16: 100.0,
}
# Triton's interpreter takes a second for a few programs, which are of 1024 values
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
LONG = (40, 30) if INTERPRETED else (60, 80)
CASES = {  # name -> shape of x, whether its mean is far from 0
    'several samples': ((3, 6, 5, 5), False),
    'one sample, one group': ((1, 5, 5, 7), False),
    'long rows': ((2, 4, *LONG), False),
    'volumes': ((2, 4, 2, 3, 4), False),
    'L = 1': ((4, 12, 1, 1), False),
    'N = L = 1': ((1, 12, 1, 1), False),
    'far': ((3, 6, 5, 5), True),
    'far, one sample': ((1, 6, 40, 40), True),
    'far, L = 1': ((4, 12, 1, 1), True),
}

# times dtypes and layouts
EXAMPLES = 6 if INTERPRETED else 30


def _served():
    """Pairs of a backend and a dtype."""
    for name, kernels in {**BACKENDS, 'functional': eager.Functional()}.items():
        for dtype in DTYPES:
            served = kernels.serves(torch.empty(1, 1, dtype=dtype))
            skip = pytest.mark.skipif(not served, reason='not served by the backend')
            short = str(dtype).split('.')[1]
            yield pytest.param(kernels, dtype, id=f'{name}-{short}', marks=skip)


every_backend = pytest.mark.parametrize('kernels, dtype', list(_served()))
every_layout = pytest.mark.parametrize('layout', LAYOUTS)
every_case = pytest.mark.parametrize('shape, far', CASES.values(), ids=CASES)
both_stages = pytest.mark.parametrize(
    'estimate', [True, False], ids=['estimate', 'batch']
)


def draw(shape, dtype, layout, mean=1.0):
    mean = min(mean, torch.finfo(dtype).max / 2)  # float16 ends at 65504
    return layout((torch.randn(shape) + mean).to(dtype))


def statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operands(kernels, x, estimate=True):
    """What the functions take beside ``x``, nothing of it special."""
    channels, groups = x.shape[1], 1 + (x.shape[1] % 2 == 0)
    moments, spec = kernels.moments(x), Spec(groups, 1e-5)
    like = dict(dtype=moments.mean.dtype)
    across = x.to(**like).transpose(0, 1).flatten(1)
    if estimate:
        mean = across.mean() + torch.randn(channels, **like)
        batch = Batch(mean, torch.rand(channels, **like) + 0.5, None)
    else:
        var, mean = torch.var_mean(across, 1, correction=0)
        batch = Batch(mean, (var + spec.eps).rsqrt(), across.shape[1])
    affine = Affine(*torch.randn(2, channels, **like), *torch.randn(2, groups, **like))
    return moments, batch, affine, spec


def definition(x, batch, affine, spec):
    """The result in float64, of leaves in float64."""
    y, *_ = reference.bcn(
        x,
        spec.num_groups,
        batch.mean.double(),
        batch.inv_std.double() ** -2 - spec.eps,
        *affine,
        training=batch.num_values is not None,
        estimate=False,
        momentum=0.1,
    )
    return y


def rounding_of_the_mean(x):
    """What it may cost values that vary by 1."""
    return torch.finfo(statistics_dtype(x)).eps * x.double().abs().max().item()


def check_moments(kernels, x):
    mean, var, _ = kernels.moments(x)
    assert mean.dtype == var.dtype == statistics_dtype(x)
    exact = x.double().flatten(2)
    centre = exact.mean(2, keepdim=True)
    spread = (exact - centre).square().mean(2)
    tight = 1e-10 if x.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(mean.double(), centre.squeeze(2), rtol=tight, atol=tight)
    torch.testing.assert_close(var.double(), spread, rtol=10 * tight, atol=1e-12)


def check_normalize(kernels, x, estimate):
    known = operands(kernels, x, estimate)
    _, batch, affine, spec = known
    y = kernels.normalize(x, *known)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    want = definition(x.double(), batch, [t.double() for t in affine], spec)
    # one rounding to the dtype of x
    eps = torch.finfo(x.dtype).eps
    floor = 1e-9 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        y.double(), want, rtol=eps, atol=max(floor, 4 * rounding_of_the_mean(x))
    )


def check_backward(kernels, x, estimate):
    dy = torch.empty_like(x).copy_(torch.randn(x.shape))
    known = operands(kernels, x, estimate)
    _, batch, affine, spec = known
    leaf = x.clone().double().requires_grad_()
    leaves = [t.clone().double().requires_grad_() for t in affine]
    y = definition(leaf, batch, leaves, spec)
    want = torch.autograd.grad(y, [leaf, *leaves], dy.double())
    sums = kernels.backward_reduce(dy, x, *known)
    dx = kernels.backward_input(dy, x, sums, *known)
    assert dx.dtype == x.dtype and dx.stride() == x.stride()
    assert len(sums.along[0]) == len(sums.along[1]) == x.shape[1]
    for got, value in zip((dx, *sums.affine), want):
        eps = torch.finfo(got.dtype).eps
        slack = 2 * eps
        if got.dtype == statistics_dtype(x):
            slack = max(1e3 * eps, 32 * rounding_of_the_mean(x))
        size = value.abs().max().item()
        torch.testing.assert_close(got.double(), value, rtol=4 * eps, atol=slack * size)


@every_backend
@every_layout
@pytest.mark.parametrize(
    'shape', [(1, 5, 3, 4), (3, 5, 3, 4), (2, 4, 1, 1), (1, 3, *LONG)]
)
@pytest.mark.parametrize('ratio', [0, 3, 1e2, 1e5])
def test_moments_do_not_cancel(kernels, dtype, layout, shape, ratio):
    check_moments(kernels, draw(shape, dtype, layout, ratio))


@every_backend
@every_layout
@every_case
@both_stages
def test_normalize_is_the_definition(kernels, dtype, layout, shape, far, estimate):
    x = draw(shape, dtype, layout, FAR[dtype] if far else 1.0)
    check_normalize(kernels, x, estimate)


@every_backend
@every_layout
@every_case
@both_stages
def test_backward_is_the_derivative(kernels, dtype, layout, shape, far, estimate):
    x = draw(shape, dtype, layout, FAR[dtype] if far else 1.0)
    check_backward(kernels, x, estimate)


@every_backend
@every_layout
@both_stages
@pytest.mark.parametrize('shape', [(2, 4, 60, 80), (3, 6, 5, 5)])
@pytest.mark.parametrize('portion', [1, 9000, 1 << 24])
def test_portions_change_nothing(
    kernels, dtype, layout, estimate, shape, portion, monkeypatch
):
    """...of what holds for tensors that are worked on as a whole."""
    for module in (eager, native):
        monkeypatch.setattr(module, '_PORTION', portion)
    x = draw(shape, dtype, layout)
    check_moments(kernels, 200 * x)  # whose squares overflow float16
    check_normalize(kernels, x, estimate)
    check_backward(kernels, x, estimate)


@every_backend
@every_layout
@settings(max_examples=EXAMPLES)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    bad=st.lists(
        st.sampled_from([float('nan'), float('inf'), -float('inf'), 1e30]),
        min_size=1,
        max_size=3,
    ),
    offset=st.sampled_from([0.0, 10.0, 1e5]),
    seed=st.integers(0, 999),
)
def test_rows_do_not_see_each_other(kernels, dtype, layout, shape, bad, offset, seed):
    """...whatever is not finite, or overflows, in some of them."""
    torch.manual_seed(seed)
    x = draw(shape, dtype, lambda x: x, offset)
    spoilt = x.clone()
    for value in bad:
        n, c, i, j = (torch.randint(s, ()) for s in shape)
        spoilt[n, c, i, j] = torch.tensor(value).to(dtype)
    same = (x == spoilt).flatten(2).all(2)
    x, spoilt = layout(x), layout(spoilt)
    moments, hurt = kernels.moments(x), kernels.moments(spoilt)
    for want, got in zip(moments[:2], hurt):
        assert torch.equal(got[same], want[same])
    assert (hurt.var[same] >= 0).all()
    # one group for all would mix them
    moments, batch, affine, _ = operands(kernels, x)
    affine = affine._replace(weight=None, bias=None)
    spec = Spec(shape[1], 1e-5)
    y = kernels.normalize(spoilt, hurt, batch, affine, spec)
    want = kernels.normalize(x, moments, batch, affine, spec)
    assert torch.equal(y[same], want[same])


@every_backend
@every_layout
@settings(max_examples=EXAMPLES)
@given(
    n=st.integers(1, 3),
    size=st.integers(1, 7),
    value=st.sampled_from([0.0, 0.1, 100.3, -3e4]),
    inv_std=st.sampled_from([1.0, 316.0]),
)
def test_planes_of_one_value_stay_planes_of_one_value(
    kernels, dtype, layout, n, size, value, inv_std
):
    x = torch.full((n, 4, size, size), value, dtype=dtype)
    x = layout(x * torch.rand(1, 4, 1, 1).to(dtype))
    moments, batch, affine, spec = operands(kernels, x)
    batch = Batch(x[0, :, 0, 0].to(batch.mean), batch.inv_std * inv_std, 1)
    known = moments, batch, affine, spec
    y = kernels.normalize(x, *known)
    sums = kernels.backward_reduce(x, x, *known)
    dx = kernels.backward_input(x, x, sums, *known)
    _, at_mean = stages.forward(*known)
    assert not moments.var.any()
    want = at_mean[:, :, None, None].expand(x.shape).to(dtype)
    assert torch.equal(y, want)
    assert torch.equal(dx, dx[:, :, :1, :1].expand(x.shape))


@every_backend
@every_layout
@every_case
@both_stages
def test_relu_inside_is_one_behind(kernels, dtype, layout, shape, far, estimate):
    x = draw(shape, dtype, layout, FAR[dtype] if far else 1.0)
    dy = torch.empty_like(x).copy_(torch.randn(x.shape))
    *known, spec = operands(kernels, x, estimate)
    plain, inside = (*known, spec), (*known, spec._replace(relu=True))
    y = kernels.normalize(x, *plain)
    # where rounding decides, the gradient may be that of either side
    clear = torch.where(y.abs() > 1e-3, dy, 0)
    assert torch.equal(kernels.normalize(x, *inside), y.relu())
    masked = torch.where(y > 0, clear, 0)
    want = kernels.backward_reduce(masked, x, *plain)
    got = kernels.backward_reduce(clear, x, *inside)
    tight = dict(rtol=1e-5, atol=1e-4 * max(1, dy.abs().max().item()))
    torch.testing.assert_close(got.affine, want.affine, **tight)
    torch.testing.assert_close(
        kernels.backward_input(clear, x, got, *inside),
        kernels.backward_input(masked, x, want, *plain),
        rtol=4 * torch.finfo(dtype).eps,
        atol=tight['atol'],
    )


@every_backend
@every_layout
@every_case
@pytest.mark.parametrize('relu', [False, True])
def test_a_pass_is_made_again(kernels, dtype, layout, shape, far, relu):
    """Bit for bit, of what it wrote down."""
    x = draw(shape, dtype, layout, FAR[dtype] if far else 1.0)
    moments, batch, affine, spec = operands(kernels, x)
    if not kernels.fused:
        y = kernels.normalize(x, moments, batch, affine, spec._replace(relu=relu))
        coef = stages.forward(moments, batch, affine, spec)
    else:
        coef = x.new_full((2, *x.shape[:2]), float('nan'), dtype=moments.mean.dtype)
        running = Running(batch.mean, batch.inv_std.square(), torch.tensor(0))
        rule = Rule(True, True, 0.1, 'identity', spec.eps)
        plain = kernels.forward(x, running, rule, affine, spec, coef=coef)
        n, c = x.shape[:2]
        mean, var = plain[1][0][: 2 * n * c].view(2, n, c).unbind()
        moments = Moments(mean, var)
        y = plain[0].relu() if relu else plain[0]
    again = kernels.apply(x, moments, coef, relu)
    assert torch.equal(again, y) and again.stride() == y.stride()
    other = torch.randn_like(x)
    want = kernels.apply(x, moments, coef) + other
    if INTERPRETED and dtype == torch.bfloat16:  # which it cuts off, and never rounds
        want = kernels.apply(x, moments, coef).float() + other.float()
        want = (want.view(torch.int32) & -(1 << 16)).view(torch.float32).to(dtype)
    summed = kernels.apply(x, moments, coef, relu, other)
    assert torch.equal(summed, want.relu() if relu else want)
    assert summed.stride() == y.stride()


@every_backend
@every_layout
@pytest.mark.parametrize('n', [1, 2])
def test_results_are_no_views(kernels, dtype, layout, n):
    """An in-place ReLU follows."""
    x = draw((n, 4, 4, 4), dtype, layout)
    assert not kernels.normalize(x, *operands(kernels, x))._is_view()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_nothing_to_do(backend, dtype, shape):
    """Of N = 0 or L = 0, whichever backend is chosen."""
    x = torch.randn(shape).to(dtype)
    kernels, like = kernels_for(x), dict(dtype=statistics_dtype(x))
    moments = kernels.moments(x)
    assert moments.mean.shape == moments.var.shape == (0, 4)
    batch = Batch(torch.zeros(4, **like), torch.ones(4, **like), 0)
    affine = Affine(*torch.randn(2, 4, **like), *torch.randn(2, 2, **like))
    known = moments, batch, affine, Spec(2, 1e-5)
    y = kernels.normalize(x, *known)
    sums = kernels.backward_reduce(x, x, *known)
    dx = kernels.backward_input(x, x, sums, *known)
    assert y.shape == dx.shape == shape and y.dtype == dx.dtype == dtype
    for got, parameter in zip(sums.affine, affine):
        assert torch.equal(got, torch.zeros_like(parameter))
    assert not sums.along[0].any() and not sums.along[1].any()
