"""The passes over full-size tensors that every operator here is made of.

A normalization whose statistics are known is ``y = A (x - m) + B`` with one
triple per row, a row being one (sample, channel) and m its mean. Three passes
suffice: :func:`moments` reads ``x``, :func:`apply` reads ``x`` and writes
``y``, and :func:`reduce` reads ``dy`` and ``x``. Everything between them works
on ``(N, C)`` tensors.

Tensors are ``(N, C, *spatial)``, contiguous or channels-last (:func:`dense`
makes any other layout contiguous); results keep the layout of ``x``.

There are two routes through each. The *general* one consists of ordinary
operators, used in ordinary ways, and serves every device, compilers included.
The CPU has *shortcuts*: native kernels that were made for something else, and
a look at values where that saves a pass.
"""

import os
from typing import Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

_aten = torch.ops.aten

#: Whether the CPU takes its shortcuts. ``BCN_MM_SHORTCUTS=0`` in the
#: environment has it take the route of all other devices.
SHORTCUTS = os.environ.get('BCN_MM_SHORTCUTS', '1') != '0'

# Rows whose squared mean exceeds this many variances get their variance from
# centred values; below it the sum of squares loses at most three bits.
_CANCELLATION = 4.0
# Rows whose squared mean exceeds this many variances are centred before they
# are scaled; below it the rounding of ``B - A m`` costs at most eight bits.
_FAR = 65536.0
# Elements that may be copied at once: 1 MiB of float32 on the CPU, to stay in
# its cache, 64 MiB elsewhere.
_PORTION = 1 << 18
_LARGE_PORTION = 1 << 24
# Rows up to this length are summed by one native call that reads them once,
# in one chain of vector additions; longer rows need the cascade of torch.sum.
_SHORT_ROW = 1 << 12


class Moments(NamedTuple):
    """Of every row: (N, C) tensors of :func:`compute_dtype`."""

    mean: Tensor
    var: Tensor  # biased
    # Whether a row has a mean of more than the square root of _FAR standard
    # deviations, as far as the CPU's shortcuts want to know
    far: bool = True


def exporting() -> bool:
    """Whether the calls are being recorded for another runtime.

    By ``torch.jit.trace``, ``torch.export`` or ``torch.onnx``, that is. What
    is recorded must consist of plain operators and hold for other inputs too,
    so it can neither look at values nor take the native shortcuts.
    """
    recording = getattr(torch.compiler, 'is_exporting', bool)  # torch >= 2.7
    return torch.jit.is_tracing() or recording()


def transforming() -> bool:
    """Whether ``torch.func`` transforms the calls (grad, vmap, ...)."""
    return torch._C._are_functorch_transforms_active()


def has_shortcuts(x: Tensor) -> bool:
    """Whether the passes over ``x`` take the CPU's shortcuts."""
    return (
        SHORTCUTS
        and x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and not transforming()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """Return ``x`` itself if contiguous or channels-last, else a copy."""
    if x.is_contiguous() or _is_channels_last(x):
        return x
    return x.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return False


def like(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t`` in the layout of the dense tensor ``x``."""
    if x.is_contiguous():
        return t.contiguous()
    fmt = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return t.contiguous(memory_format=fmt)


def _flat(x: Tensor) -> Tensor:
    """View a dense tensor as (N, C, L)."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _over(x: Tensor, *rows: Tensor) -> Iterator[Tensor]:
    """View (N, C) tensors so that they broadcast over ``x``."""
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    return (t.view(shape) for t in rows)


def _rows(x: Tensor):
    """View ``x`` with all its rows in dimension 1, or None if no view can.

    The native batch-norm kernels then see each row as a channel of its own.
    """
    if x.is_contiguous():
        return x.view(1, x.shape[0] * x.shape[1], -1)
    return x if x.shape[0] == 1 and x.dim() == 4 else None


def _portions(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Split tensors of (N, C, ...) alike, the first into portions."""
    if tensors[0].numel() <= _LARGE_PORTION:
        yield tensors
        return
    channels, length = tensors[0].shape[1:]
    count = max(1, _LARGE_PORTION // length)  # rows in a portion
    whole = max(1, count // channels)  # samples in it
    for samples in zip(*(t.split(whole) for t in tensors)):
        if count >= channels:
            yield samples
        else:
            yield from zip(*(t.split(count, 1) for t in samples))


def _has_single_values(x: Tensor) -> bool:
    """Whether every row is one value, and so its own mean."""
    return x.shape[2:].numel() == 1


def moments(x: Tensor) -> Moments:
    """Mean and biased variance of every row.

    Args:
        x (Tensor): Dense, of shape (N, C, *spatial) with L > 0 spatial
            elements, any floating dtype.

    Returns:
        Moments: float64 for float64 input and float32 otherwise. On the CPU
        their error does not grow with ``|mean| / std``; elsewhere it is that
        of ``torch.var_mean``.
    """
    x, dtype = _flat(x), compute_dtype(x)
    if x.shape[2] == 1:
        mean = x[:, :, 0].to(dtype, copy=True)
        return Moments(mean, torch.zeros_like(mean), False)
    if has_shortcuts(x):
        return _moments_on_cpu(x, dtype)
    if x.dtype == dtype or torch.compiler.is_compiling() or transforming():
        var, mean = torch.var_mean(x.to(dtype), dim=2, correction=0)
        return Moments(mean, var)
    mean, var = x.new_empty(2, *x.shape[:2], dtype=dtype)
    for part, m, v in _portions(x, mean, var):
        v_part, m_part = torch.var_mean(part.to(dtype), dim=2, correction=0)
        m.copy_(m_part)
        v.copy_(v_part)
    return Moments(mean, var)


def _moments_on_cpu(x: Tensor, dtype: torch.dtype) -> Moments:
    """From sums and sums of squares, twenty times faster than var_mean.

    Where their difference would cancel, the few rows concerned are done again.
    """
    length = x.shape[2]
    if length <= _SHORT_ROW and x.is_contiguous():
        mean, square = _sums(x, x, None, dtype)
    elif _in_portions(x):
        rows = x.view(-1, length)
        mean, square = x.new_empty(2, *x.shape[:2], dtype=dtype)
        step = max(1, _PORTION // length)
        for row, total, squared in zip(
            *(t.view(rows.shape[0], -1).split(step)
              for t in (rows, mean, square))
        ):  # fmt: skip
            row = row.to(dtype)
            total.copy_(row.sum(dim=1, keepdim=True))
            squared.copy_(
                torch.linalg.vector_norm(row, dim=1, keepdim=True).square_()
            )
    else:
        mean = x.sum(dim=2, dtype=dtype)
        if x.is_contiguous():
            square = torch.linalg.vector_norm(x, dim=2, dtype=dtype).square_()
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


def _where_not(t: Tensor, length: int) -> Iterator[Tuple[Tensor, ...]]:
    """The rows in which ``t`` is not at most 0, NaN included, in portions."""
    if t.max().item() <= 0:
        return
    step = max(1, _PORTION // length)
    for index in (~(t <= 0)).nonzero().split(step):
        yield index.unbind(1)


def _far_rows(x: Tensor, moments: Moments) -> Iterator[Tuple[Tensor, ...]]:
    """The rows that have to be centred before they are scaled."""
    mean, var, far = moments
    if far:
        far = torch.addcmul(var * -_FAR, mean, mean)
        yield from _where_not(far, x.shape[2:].numel())


def apply(
    x: Tensor, moments: Moments, scale: Tensor, at_mean: Tensor
) -> Tensor:
    """Return the fresh tensor ``scale * (x - mean) + at_mean``, row by row.

    Args:
        x (Tensor): Dense, of shape (N, C, *spatial).
        moments (Moments): Of ``x``.
        scale (Tensor): (N, C), in :func:`compute_dtype` of ``x``.
        at_mean (Tensor): likewise.

    Returns:
        Tensor: of the shape, dtype and layout of ``x``. Where all values of a
        row are equal, so are those of the result, and equal to ``at_mean``.
    """
    if _has_single_values(x):
        return torch.empty_like(x).copy_(at_mean.view(x.shape))
    if torch.compiler.is_compiling():
        mean, scale, at_mean = _over(x, moments.mean, scale, at_mean)
        return torch.addcmul(at_mean, x - mean, scale).to(x.dtype)
    if not has_shortcuts(x):
        y = torch.empty_like(x)
        rows = (t.unsqueeze(2) for t in (moments.mean, scale, at_mean))
        for part, out, m, a, b in _portions(_flat(x), _flat(y), *rows):
            torch.addcmul(b, part - m, a, out=out)
        return y
    y = _scale(x, scale, torch.addcmul(at_mean, scale, moments.mean, value=-1))
    for n, c in _far_rows(x, moments):
        rows = _flat(x)[n, c].to(scale.dtype) - moments.mean[n, c, None]
        rows = torch.addcmul(at_mean[n, c, None], rows, scale[n, c, None])
        _flat(y)[n, c] = rows.to(y.dtype)
    return y


def _scale(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the fresh tensor ``scale * x + shift``, on the CPU."""
    rows = _rows(x)
    if rows is None:
        y = torch.empty_like(x)
        torch.addcmul(
            shift.unsqueeze(2), _flat(x), scale.unsqueeze(2), out=_flat(y)
        )
        return y
    zero = scale.new_zeros(scale.numel())
    # running statistics 0 and 0 with eps 1 make a batch norm a plain affine
    y = _aten.native_batch_norm(
        rows, scale.flatten(), shift.flatten(), zero, zero, False, 0.0, 1.0
    )[0]
    # not .view(): autograd forbids in-place use (a ReLU, say) of a view that
    # was made inside a Function
    return y if rows is x else _aten._unsafe_view(y, x.shape)


def reduce(dy: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor]:
    """Row sums of ``dy`` and of ``dy * (x - mean)``.

    Args:
        dy (Tensor): (N, C, *spatial), in the layout of ``x``.
        x (Tensor): Dense, of the same shape.
        mean (Tensor): (N, C), in :func:`compute_dtype` of ``x``.

    Returns:
        tuple[Tensor, Tensor]: two (N, C) tensors of the dtype of ``mean``.
    """
    if has_shortcuts(x) and x.is_contiguous():
        return _sums(dy, x, mean, mean.dtype)
    dy, x, mean = _flat(dy), _flat(x), mean.unsqueeze(2)
    total = dy.sum(dim=2, dtype=mean.dtype)
    if has_shortcuts(x) or torch.compiler.is_compiling():
        return total, (x - mean).mul_(dy).sum(dim=2)
    centred = torch.empty_like(total)
    for d, part, m, out in _portions(dy, x, mean, centred):
        out.copy_((part - m).mul_(d).sum(dim=2))
    return total, centred


def _sums(
    dy: Tensor, x: Tensor, mean: Optional[Tensor], dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """:func:`reduce` for a contiguous ``x``, on the CPU."""
    rows = _rows(x)
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


def apply_add(
    dy: Tensor,
    x: Tensor,
    dy_mean: Tensor,
    moments: Moments,
    dy_scale: Tensor,
    x_scale: Tensor,
    at_mean: Tensor,
) -> Tensor:
    """Return ``dy_scale * (dy - dy_mean) + x_scale * (x - mean) + at_mean``.

    A fresh tensor; :func:`apply` for the gradient of ``x``.
    """
    if _has_single_values(x):
        return torch.empty_like(x).copy_(at_mean.view(x.shape))
    mean = moments.mean
    if torch.compiler.is_compiling():
        dy_mean, mean, dy_scale, x_scale, at_mean = _over(
            x, dy_mean, mean, dy_scale, x_scale, at_mean
        )
        out = torch.addcmul(at_mean, x - mean, x_scale)
        return torch.addcmul(out, dy - dy_mean, dy_scale).to(x.dtype)
    rows = (dy_mean, mean, dy_scale, x_scale, at_mean)
    if not has_shortcuts(x):
        dx = torch.empty_like(x)
        for out, d, part, *known in _portions(
            *map(_flat, (dx, dy, x)), *(t.unsqueeze(2) for t in rows)
        ):
            d_m, m, d_a, a, b = known
            part = torch.addcmul(b, part - m, a)
            torch.addcmul(part, d - d_m, d_a, out=out)
        return dx
    shift = torch.addcmul(at_mean, x_scale, mean, value=-1)
    dx = _scale(x, x_scale, shift.addcmul_(dy_scale, dy_mean, value=-1))
    if _in_portions(x):
        step = max(1, _PORTION // x.shape[2:].numel())
        parts = (t.view(mean.numel(), -1) for t in (dx, dy, dy_scale))
        for out, d, scale in zip(*(t.split(step) for t in parts)):
            out.addcmul_(d, scale)
    else:
        _flat(dx).addcmul_(_flat(dy), dy_scale.unsqueeze(2))
    for n, c in _far_rows(x, moments):
        d_m, m, d_a, a, b = (t[n, c, None] for t in rows)
        part = torch.addcmul(b, _flat(x)[n, c].to(mean.dtype) - m, a)
        part = torch.addcmul(part, _flat(dy)[n, c].to(mean.dtype) - d_m, d_a)
        _flat(dx)[n, c] = part.to(dx.dtype)
    return dx


def _in_portions(x: Tensor) -> bool:
    """Whether ``x``, on the CPU, is best worked on a few rows at a time.

    Where dtypes mix, the CPU's kernels copy their whole operands to float32;
    copies of a few rows stay in its cache.
    """
    return x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous()
