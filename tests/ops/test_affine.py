import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bcn_mm.ops import affine
from bcn_mm.ops.affine import Moments

LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.fixture(params=['shortcuts', 'general'])
def route(request, monkeypatch):
    """The CPU's own route through the passes, and that of other devices."""
    monkeypatch.setattr(affine, 'SHORTCUTS', request.param == 'shortcuts')
    return request.param


@pytest.fixture(params=[1, 9000, 1 << 24])
def portion(request, monkeypatch):
    for name in ('_PORTION', '_LARGE_PORTION'):
        monkeypatch.setattr(affine, name, request.param)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'shape', [(1, 5, 3, 4), (3, 5, 3, 4), (2, 4, 1, 1), (1, 3, 80, 60)]
)  # fmt: skip
@pytest.mark.parametrize('ratio', [0, 3, 1e2, 1e5])
def test_moments_do_not_cancel(layout, shape, ratio, route):
    x = LAYOUTS[layout](torch.randn(shape) + ratio)
    mean, var, _ = affine.moments(x)
    exact = x.double().flatten(2)
    torch.testing.assert_close(
        mean.double(), exact.mean(2), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        var.double(), exact.var(2, unbiased=False), rtol=1e-5, atol=1e-12
    )


def test_moments_repair_in_several_portions(monkeypatch):
    monkeypatch.setattr(affine, '_PORTION', 20)
    x = torch.randn(4, 6, 3, 3, dtype=torch.double)
    x[1:3] += 1e6
    mean, var, _ = affine.moments(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(
        var, x.flatten(2).var(2, unbiased=False), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize('layout', LAYOUTS)
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
def test_rows_do_not_see_each_other(layout, shape, bad, offset, seed):
    """...whatever is not finite, or overflows, in some of them."""
    torch.manual_seed(seed)
    x = torch.randn(shape) + offset
    spoilt = x.clone()
    for value in bad:
        n, c, i, j = (torch.randint(s, ()) for s in shape)
        spoilt[n, c, i, j] = value
    same = (x == spoilt).flatten(2).all(2)
    x, spoilt = LAYOUTS[layout](x), LAYOUTS[layout](spoilt)
    for want, got in zip(affine.moments(x)[:2], affine.moments(spoilt)):
        assert torch.equal(got[same], want[same])
    scale, at_mean = torch.randn(2, *shape[:2])
    moments = affine.moments(spoilt)
    assert (moments.var[same] >= 0).all()
    y = affine.apply(spoilt, moments, scale, at_mean)
    want = affine.apply(x, affine.moments(x), scale, at_mean)
    assert torch.equal(y[same], want[same])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_moments_of_half_precision_are_float32(dtype, layout, route, portion):
    # squares overflow float16
    x = LAYOUTS[layout](torch.randn(2, 3, 40, 40).to(dtype) * 200)
    mean, var, _ = affine.moments(x)
    assert mean.dtype == var.dtype == torch.float32
    exact = x.double().flatten(2)
    torch.testing.assert_close(
        var.double(), exact.var(2, unbiased=False), rtol=1e-5, atol=0
    )


def operands(x):
    """Moments of ``x`` and rows of numbers."""
    return affine.moments(x), *torch.randn(4, *x.shape[:2])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_half_precision_in_portions(layout, route, portion):
    """Of rows, however many at once: the passes of the whole."""
    x, dy = (torch.randn(2, 2, 3, 60, 80) + 1).bfloat16()
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    moments, a, b, d, e = operands(x)
    exact = x.double().flatten(2)
    torch.testing.assert_close(moments.mean, exact.mean(2).float())
    torch.testing.assert_close(
        moments.var, exact.var(2, correction=0).float()
    )
    full = (2, 3, 1, 1)
    centred = x.double() - moments.mean.double().view(full)
    y = affine.apply(x, moments, a, b)
    want = a.view(full) * centred + b.view(full)
    # one rounding to bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-5)
    assert y.stride() == x.stride() and y.dtype == x.dtype
    total, moment = affine.reduce(dy, x, moments.mean)
    torch.testing.assert_close(total, dy.double().sum((2, 3)).float())
    torch.testing.assert_close(
        moment, (dy.double() * centred).sum((2, 3)).float(), rtol=1e-4,
        atol=1e-2,
    )  # fmt: skip
    dx = affine.apply_add(dy, x, d, moments, a, b, e)
    want = a.view(full) * (dy.double() - d.view(full))
    want = want + b.view(full) * centred + e.view(full)
    torch.testing.assert_close(dx.double(), want, rtol=2**-7, atol=2**-5)
    assert dx.stride() == x.stride() and dx.dtype == x.dtype


@given(
    n=st.integers(1, 3),
    c=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    shortcuts=st.booleans(),
    portion=st.sampled_from([1, 7, 30, 1 << 24]),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_passes_agree_with_broadcasting(
    n, c, size, layout, shortcuts, portion, offset
):
    x, dy = torch.randn(2, n, c, *size, dtype=torch.double)
    a, b, d, e = torch.randn(4, n, c, dtype=torch.double)
    x, dy = LAYOUTS[layout](x + offset), LAYOUTS[layout](dy)
    full = (n, c, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, 'SHORTCUTS', shortcuts)
        patch.setattr(affine, '_LARGE_PORTION', portion)
        moments = affine.moments(x)
        y = affine.apply(x, moments, a, b)
        total, moment = affine.reduce(dy, x, moments.mean)
        d_mean = dy.mean((2, 3))
        dx = affine.apply_add(dy, x, d_mean, moments, a, d, e)
    mean = x.mean((2, 3))
    torch.testing.assert_close(moments.mean, mean)
    centred = x - mean.view(full)
    torch.testing.assert_close(
        moments.var, centred.square().mean((2, 3)), rtol=1e-7, atol=1e-20
    )
    tight = dict(rtol=1e-9, atol=1e-9)
    want = a.view(full) * centred + b.view(full)
    torch.testing.assert_close(y, want, **tight)
    assert y.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(total, dy.sum((2, 3)))
    torch.testing.assert_close(moment, (dy * centred).sum((2, 3)), **tight)
    want = a.view(full) * (dy - d_mean.view(full)) + d.view(full) * centred
    torch.testing.assert_close(dx, want + e.view(full), **tight)
    assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize('dtype', [torch.float, torch.bfloat16, torch.double])
@pytest.mark.parametrize('layout', LAYOUTS)
@given(
    n=st.integers(1, 3),
    size=st.integers(1, 7),
    value=st.sampled_from([0.0, 0.1, 100.3, -3e4]),
    scale=st.sampled_from([1.0, 1e5, 1e10]),
    shortcuts=st.booleans(),
)
def test_planes_of_one_value_stay_planes_of_one_value(
    dtype, layout, n, size, value, scale, shortcuts
):
    x = torch.full((n, 3, size, size), value, dtype=dtype)
    x = LAYOUTS[layout](x * torch.rand(1, 3, 1, 1).to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, 'SHORTCUTS', shortcuts)
        moments = affine.moments(x)
        at_mean = torch.randn(n, 3, dtype=moments.mean.dtype)
        scale = torch.full_like(at_mean, scale)
        y = affine.apply(x, moments, scale, at_mean)
        dx = affine.apply_add(
            x, x, moments.mean, moments, scale, scale, at_mean
        )
    want = at_mean[:, :, None, None].expand(x.shape).to(dtype)
    assert not moments.var.any()
    assert torch.equal(y, want) and torch.equal(dx, want)


def test_apply_returns_no_view(route):
    one = torch.ones(2, 3)
    for x in (torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)):
        for layout in LAYOUTS.values():
            rows = one[: len(x)]
            y = affine.apply(layout(x), Moments(rows, rows), rows, rows)
            assert not y._is_view()


def test_dense_copies_only_what_it_must():
    x = torch.randn(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert affine.dense(x) is x and affine.dense(last) is last
    strided = x[..., ::2]
    assert affine.dense(strided).is_contiguous()
