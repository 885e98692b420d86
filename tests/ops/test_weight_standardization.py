import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn.bricks.conv_ws import conv_ws_2d
from support import reference
from torch.autograd import gradcheck

from bcn_mm.ops import DIALECTS, standardize_weight


@given(
    shape=st.tuples(
        st.integers(1, 6),
        st.integers(2, 5),
        st.integers(1, 3),
        st.integers(1, 3),
    ),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    scale=st.sampled_from([1e-3, 1.0]),
    dialect=st.sampled_from(sorted(DIALECTS)),
)
def test_agrees_with_the_definition(backend, shape, offset, scale, dialect):
    w = torch.randn(shape, dtype=torch.double) * scale + offset * scale
    w.requires_grad_()
    grad = torch.randn(shape, dtype=torch.double)
    out = standardize_weight(w, dialect=dialect)
    (got,) = torch.autograd.grad(out, w, grad)
    expected = reference.standardize(w, dialect=dialect)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    (want,) = torch.autograd.grad(expected, w, grad)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 / scale)


@pytest.mark.parametrize('dialect', DIALECTS)
def test_gradcheck(dialect, backend):
    w = torch.randn(4, 3, 3, dtype=torch.double, requires_grad=True)
    assert gradcheck(lambda w: standardize_weight(w, 1e-2, dialect), w)


def test_std_is_what_mmcv_computes():
    w, x = torch.randn(8, 4, 3, 3), torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(x, standardize_weight(w)),
        conv_ws_2d(x, w),
    )


@pytest.mark.parametrize('dialect', DIALECTS)
def test_constant_filter_is_zero_with_finite_gradient(dialect, backend):
    w = torch.full((2, 3, 3, 3), 0.7, requires_grad=True)
    out = standardize_weight(w, dialect=dialect)
    out.backward(torch.randn_like(w))
    assert out.abs().max() < 1e-2
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize('dialect', DIALECTS)
def test_constant_filter_under_transforms(dialect):
    weight = torch.randn(3, 2, 3, 3)
    weight[1] = 0.5
    factor = torch.randn_like(weight)

    def loss(weight):
        return (standardize_weight(weight, dialect=dialect) * factor).sum()

    leaf = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), want)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'stdev'.*'std', 'var'"):
        standardize_weight(torch.randn(2, 3, 1, 1), dialect='stdev')
    with pytest.raises(ValueError, match=r'two or more.*\(4, 1, 1, 1\)'):
        standardize_weight(torch.randn(4, 1, 1, 1))
