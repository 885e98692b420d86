"""The CPU's shortcuts: native kernels of torch that were made for other ends.

Sums and sums of squares beat ``var_mean`` twentyfold, and a batch norm in
evaluation mode applies an affine twice as fast as a broadcast ``addcmul``.
Where that loses accuracy, which takes a look at values, the few rows concerned
are done again.
"""

from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._compat import HALF_BATCH_NORM, addcmul_into
from ..layout import flat
from ..stages import InputGradient, Moments
from .eager import Eager

_aten = torch.ops.aten

# Rows whose squared mean exceeds this many variances get their variance from
# centred values; below it the sum of squares loses at most three bits.
_CANCELLATION = 4.0
# Rows whose squared mean exceeds this many variances are centred before they
# are scaled; below it the rounding of ``B - A m`` costs at most eight bits.
_FAR = 65536.0
# Elements that are worked on at once: 1 MiB of float32, to stay in the cache.
_PORTION = 1 << 18
# Rows up to this length are summed by one native call that reads them once,
# in one chain of vector additions; longer rows need the cascade of torch.sum.
_SHORT_ROW = 1 << 12


class Native(Eager):
    """The CPU's own route."""

    on_cpu = True

    def serves(self, x: Tensor) -> bool:
        half = x.dtype == torch.float16
        return x.device.type == 'cpu' and (HALF_BATCH_NORM or not half)

    def _moments(self, rows: Tensor, dtype: torch.dtype) -> Moments:
        """From sums and sums of squares.

        Where their difference would cancel, rows are done again.
        """
        x, length = rows, rows.shape[2]
        if length <= _SHORT_ROW and x.is_contiguous():
            mean, square = _sums(x, x, None, dtype)
        elif _in_portions(x):
            rows = x.view(-1, length)
            mean, square = x.new_empty(2, *x.shape[:2], dtype=dtype)
            step = max(1, _PORTION // length)
            for row, total, squared in zip(
                *(t.view(rows.shape[0], -1).split(step) for t in (rows, mean, square))
            ):
                row = row.to(dtype)
                total.copy_(row.sum(dim=1, keepdim=True))
                norm = torch.linalg.vector_norm(row, dim=1, keepdim=True)
                squared.copy_(norm.square_())
        else:
            mean = x.sum(dim=2, dtype=dtype)
            if x.is_contiguous():
                square = torch.linalg.vector_norm(x, dim=2, dtype=dtype)
                square.square_()
            else:  # channels-last, where it is slow
                square = x.to(dtype).square().sum(dim=2)
        mean.div_(length)
        square.div_(length)
        var = torch.addcmul(square, mean, mean, value=-1)
        # square > (_CANCELLATION + 1) * var, or an overflow
        cancelled = torch.add(square, var, alpha=-1 - _CANCELLATION)
        far = False
        for n, c in _where_not(cancelled, length):
            rows = x[n, c].to(dtype)
            shift = rows.mean(dim=1, keepdim=True)
            rows = rows - shift
            rest = rows.mean(dim=1)
            rows = rows - rest.unsqueeze(1)
            m = shift.squeeze(1) + rest
            v = torch.linalg.vector_norm(rows, dim=1).square_().div_(length)
            mean[n, c], var[n, c] = m, v
            far = far or (m.square_() > v.mul_(_FAR)).any().item()
        return Moments(mean, var, far)

    def _apply(
        self, x: Tensor, moments: Moments, scale: Tensor, at_mean: Tensor
    ) -> Tensor:
        shift = torch.addcmul(at_mean, scale, moments.mean, value=-1)
        y = _scale(x, scale, shift)
        for n, c in _far_rows(x, moments):
            rows = flat(x)[n, c].to(scale.dtype) - moments.mean[n, c, None]
            rows = torch.addcmul(at_mean[n, c, None], rows, scale[n, c, None])
            flat(y)[n, c] = rows.to(y.dtype)
        return y

    def _reduce(self, dy: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor]:
        if x.is_contiguous():
            return _sums(dy, x, mean, mean.dtype)
        dy, x = flat(dy), flat(x)
        total = dy.sum(dim=2, dtype=mean.dtype)
        return total, (x - mean.unsqueeze(2)).mul_(dy).sum(dim=2)

    def _apply_add(
        self, dy: Tensor, x: Tensor, moments: Moments, g: InputGradient
    ) -> Tensor:
        mean = moments.mean
        shift = torch.addcmul(g.at_mean, g.x_scale, mean, value=-1)
        shift.addcmul_(g.dy_scale, g.dy_mean, value=-1)
        dx = _scale(x, g.x_scale, shift)
        if _in_portions(x):
            step = max(1, _PORTION // x.shape[2:].numel())
            parts = (t.view(mean.numel(), -1) for t in (dx, dy, g.dy_scale))
            for out, d, scale in zip(*(t.split(step) for t in parts)):
                addcmul_into(out, d, scale, out=out)
        else:
            out = flat(dx)
            addcmul_into(out, flat(dy), g.dy_scale.unsqueeze(2), out=out)
        for n, c in _far_rows(x, moments):
            m, d_m, d_a, a, b = (t[n, c, None] for t in (mean, *g))
            part = torch.addcmul(b, flat(x)[n, c].to(mean.dtype) - m, a)
            d = flat(dy)[n, c].to(mean.dtype) - d_m
            flat(dx)[n, c] = torch.addcmul(part, d, d_a).to(dx.dtype)
        return dx

    # Filters are the channels of a group norm with one channel per group. Its
    # backward takes a mean, a 1 / std and a gain per filter as they come, so one
    # call serves all dialects.

    def standardize(
        self, weight: Tensor, eps: float, unbiased: bool, under_root: bool
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        given, weight = weight, weight.contiguous()
        out, fan = weight.shape[0], weight[0].numel()
        bessel = fan / (fan - 1) if unbiased else 1.0
        if under_root:  # bessel * var + eps = bessel * (var + eps / bessel)
            gain = weight.new_full((out,), bessel**-0.5)
            floor = eps / bessel
        else:  # keeps a constant filter finite; below any other's variance
            gain = None
            floor = 1e-36 if weight.dtype == torch.float64 else 1e-18
        result, mean, inv_std = _aten.native_group_norm(
            weight.view(1, out, fan), gain, None, 1, out, fan, out, floor
        )
        if gain is None:  # 1 / (sqrt(bessel) * std + eps) = gain / std
            gain = (inv_std[0] * eps).add_(bessel**0.5).reciprocal_()
            result.mul_(gain.view(out, 1))
        result = _aten._unsafe_view(result, weight.shape)
        if given is not weight:
            result = torch.empty_like(given).copy_(result)
        return result, (mean, inv_std, gain)

    def standardize_backward(
        self,
        grad: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        unbiased: bool,
        under_root: bool,
    ) -> Tensor:
        mean, inv_std, gain = saved
        out, fan = weight.shape[0], weight[0].numel()
        if not under_root:
            # the variance acts through std + eps, not through a root: the
            # same gradient as with this 1 / std and gain of equal product
            bessel = fan / (fan - 1) if unbiased else 1.0
            ratio = (gain * bessel**0.5).sqrt_()
            inv_std, gain = inv_std * ratio, gain / ratio
        grad = _aten.native_group_norm_backward(
            grad.contiguous().view(1, out, fan),
            weight.contiguous().view(1, out, fan),
            mean,
            inv_std,
            gain,
            1,
            out,
            fan,
            out,
            [True, False, False],
        )[0]
        return grad.view(weight.shape)


def _scale(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the fresh tensor ``scale * x + shift``."""
    rows = _rows(x)
    if rows is None:
        y = torch.empty_like(x)
        addcmul_into(shift.unsqueeze(2), flat(x), scale.unsqueeze(2), out=flat(y))
        return y
    zero = scale.new_zeros(scale.numel())
    # running statistics 0 and 0 with eps 1 make a batch norm a plain affine
    y = _aten.native_batch_norm(
        rows, scale.flatten(), shift.flatten(), zero, zero, False, 0.0, 1.0
    )[0]
    # not .view(): autograd forbids in-place use (a ReLU, say) of a view that
    # was made inside a Function
    return y if rows is x else _aten._unsafe_view(y, x.shape)


def _sums(
    dy: Tensor, x: Tensor, mean: Optional[Tensor], dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """Row sums of dy and of dy (x - mean), for a contiguous ``x``."""
    rows = _as_channels(x)
    zero = rows.new_zeros(rows.shape[1], dtype=dtype)
    _, centred, plain = _aten.native_batch_norm_backward(
        dy.view(rows.shape),
        rows,
        None,
        zero if mean is None else mean.flatten(),
        zero,
        None,
        None,
        False,
        1.0,
        [False, True, True],
    )
    return plain.view(x.shape[:2]), centred.view(x.shape[:2])


def _as_channels(x: Tensor) -> Tensor:
    """View a contiguous ``x`` as (1, N C, L)."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


def _rows(x: Tensor) -> Optional[Tensor]:
    """View ``x`` with all its rows in dimension 1, or None if no view can.

    The native batch-norm kernels then see each row as a channel of its own.
    """
    if x.is_contiguous():
        return _as_channels(x)
    return x if x.shape[0] == 1 and x.dim() == 4 else None


def _where_not(t: Tensor, length: int) -> Iterator[Tuple[Tensor, ...]]:
    """The rows in which ``t`` is not at most 0, NaN included, in portions."""
    if t.max().item() <= 0:
        return
    step = max(1, _PORTION // length)
    for index in (~(t <= 0)).nonzero().split(step):
        yield index.unbind(1)


def _far_rows(x: Tensor, moments: Moments) -> Iterator[Tuple[Tensor, ...]]:
    """The rows that have to be centred before they are scaled."""
    if moments.far:
        mean, var, _ = moments
        excess = torch.addcmul(var * -_FAR, mean, mean)
        yield from _where_not(excess, x.shape[2:].numel())


def _in_portions(x: Tensor) -> bool:
    """Whether ``x`` is best worked on a few rows at a time.

    Where dtypes mix, the CPU's kernels copy their whole operands to float32;
    copies of a few rows stay in its cache.
    """
    return x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous()
