"""The passes over full-size tensors that every operator here is made of.

A normalization whose statistics are known is ``y = A x + B`` with one pair
``(A, B)`` per row, a row being one (sample, channel). Three passes suffice:
:func:`moments` reads ``x``, :func:`apply` reads ``x`` and writes ``y``, and
:func:`reduce` reads ``dy`` and ``x``. Everything between them works on
``(N, C)`` tensors.

Tensors are ``(N, C, *spatial)``, contiguous or channels-last (:func:`dense`
makes any other layout contiguous); results keep the layout of ``x``.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

_aten = torch.ops.aten

# Rows whose squared mean exceeds this many variances get their variance from
# centred values; below it the sum of squares loses at most three bits.
_CANCELLATION = 4.0
# Elements that may be copied at once (1 MiB of float32).
_PORTION = 1 << 18
# Rows up to this length are summed by one native call that reads them once,
# in one chain of vector additions; longer rows need the cascade of torch.sum.
_SHORT_ROW = 1 << 12


def exporting() -> bool:
    """Whether the calls are being recorded for another runtime.

    By ``torch.jit.trace``, ``torch.export`` or ``torch.onnx``, that is. What
    is recorded must consist of plain operators and hold for other inputs too,
    so it can neither look at values nor take the native shortcuts.
    """
    recording = getattr(torch.compiler, 'is_exporting', bool)  # torch >= 2.7
    return torch.jit.is_tracing() or recording()


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


def _rows(x: Tensor):
    """View ``x`` with all its rows in dimension 1, or None if no view can.

    The native batch-norm kernels then see each row as a channel of its own.
    """
    if x.is_contiguous():
        return x.view(1, x.shape[0] * x.shape[1], -1)
    return x if x.shape[0] == 1 and x.dim() == 4 else None


def moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every row.

    Args:
        x (Tensor): Dense, of shape (N, C, *spatial) with L > 0 spatial
            elements, any floating dtype.

    Returns:
        tuple[Tensor, Tensor]: mean and variance, each (N, C), float64 for
        float64 input and float32 otherwise. Their error does not grow with
        ``|mean| / std``.
    """
    x = _flat(x)
    dtype = compute_dtype(x)
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        var, mean = torch.var_mean(x.to(dtype), dim=2, correction=0)
        return mean, var
    # On the CPU sums and sums of squares beat var_mean twentyfold; where their
    # difference would cancel, the few rows concerned are done again.
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
    # square > (_CANCELLATION + 1) * var
    cancelled = torch.add(square, var, alpha=-1 - _CANCELLATION)
    if cancelled.max().item() > 0:
        for index in (
            (cancelled > 0).nonzero().split(max(1, _PORTION // length))
        ):
            n, c = index.unbind(1)
            rows = x[n, c].to(dtype)
            shift = rows.mean(dim=1, keepdim=True)
            rows = rows - shift
            rest = rows.mean(dim=1)
            mean[n, c] = shift.squeeze(1) + rest
            var[n, c] = (
                torch.linalg.vector_norm(
                    rows - rest.unsqueeze(1), dim=1
                ).square()
                / length
            )
    return mean, var


def apply(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the fresh tensor ``scale * x + shift``, row by row.

    Args:
        x (Tensor): Dense, of shape (N, C, *spatial).
        scale (Tensor): (N, C), in :func:`compute_dtype` of ``x``.
        shift (Tensor): likewise.

    Returns:
        Tensor: of the shape, dtype and layout of ``x``.
    """
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
    if not x.is_contiguous():  # where the native call is slow
        dy, x = _flat(dy), _flat(x)
        return (
            dy.sum(dim=2, dtype=mean.dtype),
            (x - mean.unsqueeze(2)).mul_(dy).sum(dim=2),
        )
    return _sums(dy, x, mean, mean.dtype)


def _sums(
    dy: Tensor, x: Tensor, mean: Optional[Tensor], dtype: torch.dtype
) -> Tuple[Tensor, Tensor]:
    """:func:`reduce` for a contiguous ``x``."""
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
    dy: Tensor, x: Tensor, dy_scale: Tensor, x_scale: Tensor, shift: Tensor
) -> Tensor:
    """Return the fresh tensor ``dy_scale * dy + x_scale * x + shift``."""
    out = apply(x, x_scale, shift)
    if not _in_portions(x):
        _flat(out).addcmul_(_flat(dy), dy_scale.unsqueeze(2))
        return out
    rows = dy_scale.view(-1, 1)
    step = max(1, _PORTION // x.shape[2:].numel())
    for o, d, scale in zip(
        *(t.view(rows.shape[0], -1).split(step) for t in (out, dy, rows))
    ):
        o.addcmul_(d, scale)
    return out


def _in_portions(x: Tensor) -> bool:
    """Whether ``x`` is best worked on a few rows at a time.

    Where dtypes mix, the CPU's kernels copy their whole operands to float32;
    copies of a few rows stay in its cache.
    """
    return (
        x.device.type == 'cpu'
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
    )
