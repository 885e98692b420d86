"""The same in plain operators, for whoever records or transforms them.

``torch.jit.trace``, ``torch.export`` and ``torch.onnx`` write down the
operators that run, for another runtime and other inputs; ``torch.func``
differentiates and maps them. Both need ordinary ones and no look at values.
"""

import warnings
from typing import Optional, Tuple

import torch
from torch import Tensor

from ._compat import is_exporting
from .layout import compute_dtype, to_dtype
from .stages import Affine, Batch, Spec


def exporting() -> bool:
    """Whether the calls are being recorded for another runtime.

    By ``torch.jit.trace``, ``torch.export`` or ``torch.onnx``, that is. What
    is recorded must consist of plain operators and hold for other inputs too,
    so it can neither look at values nor take the native shortcuts.
    """
    return torch.jit.is_tracing() or is_exporting()


def evaluate(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    affine: Affine,
    spec: Spec,
) -> Tensor:
    """Evaluation as an affine and a group norm, for every other runtime."""
    dtype = compute_dtype(x)
    z, mean, var = to_dtype(dtype, x, running_mean, running_var)
    batch_weight, batch_bias, weight, bias = to_dtype(dtype, *affine)
    scale, shift = batch_affine(mean, var, batch_weight, batch_bias, spec.eps)
    if weight is not None or bias is not None:
        # one pair per channel, without reading a size
        grouped = scale.view(spec.num_groups, -1)
        weight, bias = (
            t if t is None else t.view(-1, 1).expand_as(grouped).flatten()
            for t in (weight, bias)
        )
    y = affine_group_norm(z, spec.num_groups, scale, shift, weight, bias, spec.eps)
    return to_dtype(x.dtype, y)[0]


def differentiable(x: Tensor, batch: Batch, affine: Affine, spec: Spec) -> Tensor:
    """Both stages, which ``torch.func`` differentiates as it likes.

    Raises:
        RuntimeError: if the statistics are those of several ranks.
    """
    given, x = x.dtype, x.to(compute_dtype(x))
    mean, inv_std = batch.mean, batch.inv_std
    if batch.num_values is not None:  # the values are known, but not to autograd
        if isinstance(batch.num_values, Tensor):
            raise RuntimeError(
                'torch.func cannot differentiate statistics over all ranks'
            )
        axes = (0, *range(2, x.dim()))
        mean = x.mean(axes)
        inv_std = (x.var(axes, correction=0) + spec.eps).rsqrt()
    scale = inv_std
    if affine.batch_weight is not None:
        scale = scale * affine.batch_weight
    shift = -mean * scale
    if affine.batch_bias is not None:
        shift = shift + affine.batch_bias
    weight, bias = (
        t if t is None else t.repeat_interleave(x.shape[1] // spec.num_groups)
        for t in (affine.weight, affine.bias)
    )
    y = affine_group_norm(x, spec.num_groups, scale, shift, weight, bias, spec.eps)
    return y.to(given)


def batch_affine(
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Optional[Tensor],
    batch_bias: Optional[Tensor],
    eps: float,
) -> Tuple[Tensor, Tensor]:
    """What the batch stage does in evaluation, ``z = scale x + shift``.

    Args:
        running_mean (Tensor): (C) or (levels, C), as all that follow.
        running_var (Tensor): likewise.
        batch_weight (Tensor, optional): (C).
        batch_bias (Tensor, optional): (C).
        eps (float): Of the batch stage.

    Returns:
        tuple[Tensor, Tensor]: scale and shift, of the shape of
        ``running_mean``.
    """
    scale = (running_var + eps).rsqrt()
    if batch_weight is not None:
        scale = scale * batch_weight
    shift = -running_mean * scale
    return scale, shift if batch_bias is None else shift + batch_bias


def affine_group_norm(
    x: Tensor,
    num_groups: int,
    scale: Tensor,
    shift: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
) -> Tensor:
    """The group norm of ``scale x + shift``, in plain operators.

    What is recorded for another runtime is :func:`group_norm_by_axes`.

    Args:
        x (Tensor): ``(N, C, *spatial)``.
        num_groups (int): A divisor of C.
        scale (Tensor): (C).
        shift (Tensor): (C).
        weight (Tensor, optional): (C), the affine pair of the group norm;
            both or none.
        bias (Tensor, optional): (C).
        eps (float): Of the group norm.

    Returns:
        Tensor: of the shape of ``x``.
    """
    if exporting():
        return group_norm_by_axes(x, num_groups, weight, bias, eps, scale, shift)
    per_channel = (-1,) + (1,) * (x.dim() - 2)
    z = x * scale.view(per_channel) + shift.view(per_channel)
    # not F.group_norm, which refuses a single value per group
    return torch.group_norm(z, num_groups, weight, bias, eps)


def group_norm_by_axes(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
) -> Tensor:
    """Group norm as other runtimes compute it exactly on large pictures.

    Exporters write GroupNorm as InstanceNormalization over all values of a
    group, which onnxruntime adds up in one chain of float32: of 64 channels of
    400x664 the result is 7e-6 off, relative to the largest. Means over one
    axis at a time, of plain operators, leave 3e-7 and take no longer.

    Args:
        x (Tensor): ``(N, C, *spatial)``.
        num_groups (int): A divisor of C.
        weight (Tensor, optional): (C), the affine pair; both or none.
        bias (Tensor, optional): (C).
        eps (float): Of the norm.
        scale (Tensor, optional): (C), of an affine before the norm; both or
            none.
        shift (Tensor, optional): (C).

    Returns:
        Tensor: of the shape of ``x``.
    """
    given, dtype, channels = x.dtype, compute_dtype(x), _channels(x)
    x = to_dtype(dtype, x)[0]
    scale, shift, weight, bias = to_dtype(dtype, scale, shift, weight, bias)

    def mean_of_rows(t: Tensor) -> Tensor:
        for axis in range(t.dim() - 1, 1, -1):
            t = t.mean(axis, keepdim=True)
        return t

    def grouped(t: Tensor) -> Tensor:  # reads no size, as what is recorded should not
        return t.view(-1, num_groups, size)

    size = channels // num_groups
    mean = mean_of_rows(x)
    x = x - mean
    var = grouped(mean_of_rows(x * x))
    mean = grouped(mean)
    scale, shift, weight, bias = (
        t if t is None else grouped(t) for t in (scale, shift, weight, bias)
    )
    if scale is not None:
        mean = mean * scale
        if shift is not None:
            mean = mean + shift
        var = var * (scale * scale)
    mean = mean - mean.mean(2, keepdim=True)
    var = (var + mean * mean).mean(2, keepdim=True)
    factor = (var + eps).rsqrt()
    if weight is not None:
        factor = factor * weight
    mean = mean * factor
    if bias is not None:
        mean = mean + bias
    if scale is not None:
        factor = factor * scale
    per_row = (-1, channels) + (1,) * (x.dim() - 2)
    factor = factor.expand_as(mean).reshape(per_row)
    return to_dtype(given, x * factor + mean.reshape(per_row))[0]


def _channels(x: Tensor) -> int:
    """Their number, which is the one size that what is recorded may hold."""
    if not torch.jit.is_tracing():
        return x.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return int(x.shape[1])
