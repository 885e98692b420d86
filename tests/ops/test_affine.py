import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bcn_mm.ops import affine

LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'shape', [(1, 5, 3, 4), (3, 5, 3, 4), (2, 4, 1, 1), (1, 3, 80, 60)]
)  # fmt: skip
@pytest.mark.parametrize('ratio', [0, 3, 1e2, 1e5])
def test_moments_do_not_cancel(layout, shape, ratio):
    x = LAYOUTS[layout](torch.randn(shape) + ratio)
    mean, var = affine.moments(x)
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
    mean, var = affine.moments(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(
        var, x.flatten(2).var(2, unbiased=False), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_float32(dtype):
    x = torch.randn(2, 3, 40, 40).to(dtype) * 200  # squares overflow float16
    mean, var = affine.moments(x)
    assert mean.dtype == var.dtype == torch.float32
    exact = x.double().flatten(2)
    torch.testing.assert_close(
        var.double(), exact.var(2, unbiased=False), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize('portion', [1, 9000, 1 << 18])
def test_half_precision_in_portions(monkeypatch, portion):
    """Of rows, however many at once: the passes of the whole."""
    monkeypatch.setattr(affine, '_PORTION', portion)
    x, dy = (torch.randn(2, 2, 3, 60, 80) + 1).bfloat16()
    mean, var = affine.moments(x)
    exact = x.double().flatten(2)
    torch.testing.assert_close(mean, exact.mean(2).float())
    torch.testing.assert_close(var, exact.var(2, correction=0).float())
    a, b, d = torch.randn(3, 2, 3)
    got = affine.apply_add(dy, x, a, b, d)
    whole = affine.apply(x, b, d)
    whole.flatten(2).addcmul_(dy.flatten(2), a.unsqueeze(2))
    assert torch.equal(got, whole)


@given(
    n=st.integers(1, 3),
    c=st.integers(1, 5),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_passes_agree_with_broadcasting(n, c, size, layout):
    x, dy = torch.randn(2, n, c, *size, dtype=torch.double)
    a, b, d = torch.randn(3, n, c, dtype=torch.double)
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    full = (n, c, 1, 1)
    y = affine.apply(x, a, b)
    torch.testing.assert_close(y, a.view(full) * x + b.view(full))
    assert y.stride() == torch.empty_like(x).stride()
    total, centred = affine.reduce(dy, x, d)
    torch.testing.assert_close(total, dy.sum((2, 3)))
    torch.testing.assert_close(centred, (dy * (x - d.view(full))).sum((2, 3)))
    torch.testing.assert_close(
        affine.apply_add(dy, x, a, b, d),
        a.view(full) * dy + b.view(full) * x + d.view(full),
    )


def test_apply_returns_no_view():
    for x in (torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)):
        for layout in LAYOUTS.values():
            y = affine.apply(layout(x), torch.ones(x.shape[:2]),
                             torch.zeros(x.shape[:2]))  # fmt: skip
            assert not y._is_view()


def test_dense_copies_only_what_it_must():
    x = torch.randn(2, 3, 4, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert affine.dense(x) is x and affine.dense(last) is last
    strided = x[..., ::2]
    assert affine.dense(strided).is_contiguous()
