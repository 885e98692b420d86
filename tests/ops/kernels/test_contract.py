"""What every backend must do; see bcn_mm/ops/kernels/README.md."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import reference

from bcn_mm.ops import stages
from bcn_mm.ops.kernels import BACKENDS, eager, kernels_for, native, using
from bcn_mm.ops.layout import dense
from bcn_mm.ops.stages import Affine, Batch, Moments, Spec

LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
}
HALF = [torch.float16, torch.bfloat16]
every_backend = pytest.mark.parametrize('name', BACKENDS)
every_layout = pytest.mark.parametrize('layout', LAYOUTS)


@pytest.fixture
def backend(name):
    with using(name):
        yield


@pytest.fixture(params=[1, 9000, 1 << 24])
def portion(request, monkeypatch):
    for module in (eager, native):
        monkeypatch.setattr(module, '_PORTION', request.param)


def operands(x, estimate=True):
    """What the functions take beside ``x``, nothing of it special."""
    channels, groups = x.shape[1], 1 + (x.shape[1] % 2 == 0)
    moments = kernels_for(x).moments(x)
    like = dict(dtype=moments.mean.dtype)
    count = None if estimate else x.numel() // channels
    batch = Batch(
        torch.randn(channels, **like),
        torch.rand(channels, **like) + 0.5,
        count,
    )
    affine = Affine(*torch.randn(2, channels, **like), *torch.randn(2, groups, **like))
    return moments, batch, affine, Spec(groups, 1e-5)


def rows_of(x, t):
    return t.double().view(*t.shape, *[1] * (x.dim() - 2))


def affine_of(x, moments, batch, affine, spec):
    """What normalize is, from the algebra of the stages in float64."""
    exact = x.double().flatten(2)
    exact = Moments(exact.mean(2), exact.var(2, correction=0))
    scale, at_mean = stages.forward(
        exact,
        Batch(batch.mean.double(), batch.inv_std.double(), None),
        Affine(*(t.double() for t in affine)),
        spec,
    )
    centred = x.double() - rows_of(x, exact.mean)
    return rows_of(x, scale) * centred + rows_of(x, at_mean)


@every_backend
@every_layout
@pytest.mark.parametrize(
    'shape', [(1, 5, 3, 4), (3, 5, 3, 4), (2, 4, 1, 1), (1, 3, 80, 60)]
)
@pytest.mark.parametrize('ratio', [0, 3, 1e2, 1e5])
def test_moments_do_not_cancel(backend, layout, shape, ratio):
    x = LAYOUTS[layout](torch.randn(shape) + ratio)
    mean, var, _ = kernels_for(x).moments(x)
    exact = x.double().flatten(2)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        var.double(), exact.var(2, unbiased=False), rtol=1e-5, atol=1e-12
    )


@every_backend
@pytest.mark.parametrize('dtype', HALF)
@every_layout
def test_moments_of_half_precision_are_float32(backend, dtype, layout, portion):
    # squares overflow float16
    x = LAYOUTS[layout](torch.randn(2, 3, 40, 40).to(dtype) * 200)
    mean, var, _ = kernels_for(x).moments(x)
    assert mean.dtype == var.dtype == torch.float32
    exact = x.double().flatten(2)
    torch.testing.assert_close(
        var.double(), exact.var(2, unbiased=False), rtol=1e-5, atol=0
    )


@every_backend
@every_layout
@pytest.mark.parametrize('dtype', [torch.double, torch.float, *HALF])
@pytest.mark.parametrize(
    'shape', [(2, 4, 60, 80), (3, 6, 5, 5), (1, 4, 1, 1), (4, 2, 1, 1)]
)
def test_normalize_is_the_affine_of_the_stages(backend, layout, dtype, shape, portion):
    x = LAYOUTS[layout]((torch.randn(shape) + 1).to(dtype))
    known = operands(x)
    y = kernels_for(x).normalize(x, *known)
    assert y.dtype == dtype and y.stride() == x.stride()
    want = affine_of(x, *known)
    # one rounding to the dtype of x
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), want, rtol=eps, atol=max(1e-9, 1e-4 * (eps > 1e-10))
    )


@every_backend
@every_layout
@pytest.mark.parametrize('estimate', [True, False])
@pytest.mark.parametrize('dtype', [torch.double, torch.float, *HALF])
@pytest.mark.parametrize('shape', [(2, 4, 60, 80), (3, 6, 5, 5)])
def test_backward_is_the_derivative(backend, layout, estimate, dtype, shape, portion):
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    dy = LAYOUTS[layout](torch.randn(shape).to(dtype))
    kernels, channels = kernels_for(x), shape[1]
    leaf = x.detach().clone().double().requires_grad_()
    moments, batch, affine, spec = operands(x, estimate)
    if not estimate:
        var, mean = torch.var_mean(x.to(moments.mean.dtype), (0, 2, 3), correction=0)
        batch = Batch(mean, (var + spec.eps).rsqrt(), batch.count)
    leaves = [t.clone().double().requires_grad_() for t in affine]
    y, *_ = reference.bcn(
        leaf,
        spec.num_groups,
        batch.mean.double(),
        batch.inv_std.double() ** -2 - spec.eps,
        *leaves,
        not estimate,
        False,
        0.1,
    )
    want = torch.autograd.grad(y, [leaf, *leaves], dy.double())
    known = moments, batch, affine, spec
    sums = kernels.backward_reduce(dy, x, *known)
    dx = kernels.backward_input(dy, x, sums, *known)
    assert dx.dtype == dtype and dx.stride() == x.stride()
    assert len(sums.along[0]) == len(sums.along[1]) == channels
    eps = torch.finfo(dtype).eps
    for got, value in zip((dx, *sums.affine), want):
        size = value.abs().max().item()
        wide = eps if got is dx else torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(),
            value,
            rtol=4 * wide,
            atol=1e3 * wide * size if wide < 1e-4 else 2 * wide * size,
        )


@every_backend
@every_layout
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
def test_rows_do_not_see_each_other(name, layout, shape, bad, offset, seed):
    """...whatever is not finite, or overflows, in some of them."""
    torch.manual_seed(seed)
    x = torch.randn(shape) + offset
    spoilt = x.clone()
    for value in bad:
        n, c, i, j = (torch.randint(s, ()) for s in shape)
        spoilt[n, c, i, j] = value
    same = (x == spoilt).flatten(2).all(2)
    x, spoilt = LAYOUTS[layout](x), LAYOUTS[layout](spoilt)
    with using(name):
        kernels = kernels_for(x)
        moments, hurt = kernels.moments(x), kernels.moments(spoilt)
        for want, got in zip(moments[:2], hurt):
            assert torch.equal(got[same], want[same])
        assert (hurt.var[same] >= 0).all()
        # one group for all would mix them
        moments, batch, affine, _ = operands(x)
        affine = affine._replace(weight=None, bias=None)
        spec = Spec(shape[1], 1e-5)
        y = kernels.normalize(spoilt, hurt, batch, affine, spec)
        want = kernels.normalize(x, moments, batch, affine, spec)
    assert torch.equal(y[same], want[same])


@every_backend
@every_layout
@pytest.mark.parametrize('dtype', [torch.float, torch.bfloat16, torch.double])
@given(
    n=st.integers(1, 3),
    size=st.integers(1, 7),
    value=st.sampled_from([0.0, 0.1, 100.3, -3e4]),
    inv_std=st.sampled_from([1.0, 316.0]),
)
def test_planes_of_one_value_stay_planes_of_one_value(
    name, dtype, layout, n, size, value, inv_std
):
    x = torch.full((n, 4, size, size), value, dtype=dtype)
    x = LAYOUTS[layout](x * torch.rand(1, 4, 1, 1).to(dtype))
    with using(name):
        kernels = kernels_for(x)
        moments, batch, affine, spec = operands(x)
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
@pytest.mark.parametrize('shape', [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_nothing_to_do(backend, shape):
    x = torch.randn(shape)
    kernels = kernels_for(x)
    moments = kernels.moments(x)
    assert moments.mean.shape == moments.var.shape == (0, 4)
    batch = Batch(torch.zeros(4), torch.ones(4), 0)
    affine = Affine(*torch.randn(2, 4), *torch.randn(2, 2))
    known = moments, batch, affine, Spec(2, 1e-5)
    assert kernels.normalize(x, *known).shape == shape
    sums = kernels.backward_reduce(x, x, *known)
    assert kernels.backward_input(x, x, sums, *known).shape == shape
    for got, parameter in zip(sums.affine, affine):
        assert torch.equal(got, torch.zeros_like(parameter))
    assert not sums.along[0].any() and not sums.along[1].any()


@every_backend
def test_results_are_no_views(backend):
    """An in-place ReLU follows."""
    for x in (torch.randn(2, 4, 4, 4), torch.randn(1, 4, 4, 4)):
        for layout in LAYOUTS.values():
            x = layout(x)
            assert not kernels_for(x).normalize(x, *operands(x))._is_view()


def test_what_is_chosen():
    x = torch.randn(1, 4, 2, 2)
    assert type(kernels_for(x)) is native.Native
    assert type(kernels_for(x.to('meta'))) is eager.Eager
    with using('eager'):
        assert type(kernels_for(x)) is eager.Eager
    with using('native'):
        assert type(kernels_for(x)) is native.Native
        with pytest.raises(RuntimeError, match='native does not serve.*meta'):
            kernels_for(x.to('meta'))
    with pytest.raises(ValueError, match="auto, native, eager, but is 'x'"):
        using('x').__enter__()
    assert type(kernels_for(x)) is native.Native


def test_dense_copies_only_what_it_must():
    x = torch.randn(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert dense(x) is x and dense(last) is last
    strided = x[..., ::2]
    assert dense(strided).is_contiguous()


def test_moments_repair_in_several_portions(monkeypatch):
    monkeypatch.setattr(native, '_PORTION', 20)
    x = torch.randn(4, 6, 3, 3, dtype=torch.double)
    x[1:3] += 1e6
    mean, var, _ = native.Native().moments(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(
        var, x.flatten(2).var(2, unbiased=False), rtol=1e-7, atol=0
    )
