"""Batch-Channel Normalization in one pass.

Both stages are affine in ``x`` once the moments of every (sample, channel)
are known, so the forward pass is ``moments -> algebra -> apply`` and the
backward pass ``reduce -> algebra -> apply_add`` (see :mod:`.affine`). The
algebra below works on (N, C) and (N, G) tensors; of full size only ``x`` is
kept for the backward pass.
"""

import operator
import warnings
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import affine, recomputation
from .affine import Moments

#: How estimates begin: see ``start`` of :func:`batch_channel_norm`.
STARTS = ('identity', 'first', 'average')


def default_num_groups(num_channels: int) -> int:
    """The group count that ``num_groups=None`` stands for.

    32 where that leaves two or more channels in each group, else the largest
    divisor of ``num_channels`` that divides 32 and does, else 1.

    Example:
        >>> [default_num_groups(c) for c in (256, 72, 32, 6, 3)]
        [32, 8, 16, 2, 1]
    """
    for groups in (32, 16, 8, 4, 2):
        if num_channels % groups == 0 and num_channels // groups >= 2:
            return groups
    return 1


def check_num_groups(num_groups: int, num_channels: int) -> None:
    """Raise unless ``num_groups`` is a divisor of ``num_channels``.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it does not divide the number of channels.
    """
    try:
        operator.index(num_groups)
    except TypeError:
        raise TypeError(
            f'num_groups must be an integer, but got {num_groups!r}'
        ) from None
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f'num_groups must be a divisor of the number of channels, but '
            f'num_groups={num_groups} does not divide {num_channels}'
        )


def check_start(start: str) -> None:
    """Raise a ValueError unless ``start`` is one of :data:`STARTS`."""
    if start not in STARTS:
        raise ValueError(
            f'start must be one of {", ".join(STARTS)}, but got {start!r}'
        )


def _rate(
    momentum: Optional[float], start: str, passes: Optional[Tensor], dtype
) -> Tuple[Union[float, Tensor], Optional[Tensor]]:
    """How far the estimates move in this pass, the ``passes``-th.

    Returns:
        tuple: the rate, and the same where it is above ``momentum`` and 0
        elsewhere, or None where it never is.
    """
    if momentum is not None and start == 'identity':
        return momentum, None
    if passes is None:
        raise ValueError(
            f'momentum={momentum} with start={start!r} needs '
            f'num_batches_tracked'
        )
    if momentum is None:
        rate = passes.to(dtype).reciprocal()
        return rate, rate
    if start == 'average':
        rate = passes.to(dtype).reciprocal().clamp_min(momentum)
    else:
        rate = (passes == 1).to(dtype).clamp_min(momentum)
    return rate, rate * (rate > momentum)


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    rate: Union[float, Tensor],
) -> None:
    """Move the estimates in place, channels with non-finite news excepted."""
    # the variance is of values about a mean: finite only if that is
    finite = batch_var < float('inf')
    if running_mean.dtype != batch_mean.dtype:
        # unless the buffers' dtype overflows
        batch_mean = batch_mean.to(running_mean.dtype)
        batch_var = batch_var.to(running_var.dtype)
        finite = (batch_mean.abs() + batch_var) < float('inf')
    for running, news in (
        (running_mean, batch_mean),
        (running_var, batch_var),
    ):
        running.lerp_(torch.where(finite, news, running), rate)


class _Batch(NamedTuple):
    """What the batch stage of one pass normalizes with."""

    mean: Tensor  # (C)
    inv_std: Tensor  # (C): 1 / sqrt(variance + eps)
    # The values that the two are statistics of, over all ranks if there is a
    # process group; None if they are constants to autograd
    count: Union[None, int, Tensor]


class _Affine(NamedTuple):
    """The learnable parameters of both stages."""

    batch_weight: Optional[Tensor]  # (C)
    batch_bias: Optional[Tensor]  # (C)
    weight: Optional[Tensor]  # (G)
    bias: Optional[Tensor]  # (G)


class _Stages(NamedTuple):
    """What both passes need to know beside ``x`` and its moments."""

    factor: Tensor  # (C): batch_weight / sqrt(batch variance + eps)
    offset: Tensor  # (N, C): row means of x about the batch stage's mean
    centred: Tensor  # (N, G, D): row means of z about the group mean
    inv_group: Tensor  # (N, G, 1): 1 / sqrt(group variance of z + eps)
    gain: Tensor  # (N, G, 1): dy/dz with all statistics held fixed


def _stages(
    moments: Moments, batch: _Batch, affines: _Affine, num_groups: int,
    eps: float,
) -> _Stages:  # fmt: skip
    grouped = (moments.mean.shape[0], num_groups, -1)
    factor, offset = batch.inv_std, moments.mean - batch.mean
    if affines.batch_weight is not None:
        factor = affines.batch_weight * factor
    if affines.batch_bias is None:
        z = offset * factor
    else:
        z = torch.addcmul(affines.batch_bias, offset, factor)
    z = z.view(grouped)
    centred = z.sub_(z.mean(2, keepdim=True))
    spread = (moments.var * factor.square()).view(grouped)
    spread = spread.addcmul_(centred, centred).mean(2, keepdim=True)
    inv_group = gain = spread.add_(eps).rsqrt_()
    if affines.weight is not None:
        gain = inv_group * affines.weight.view(-1, 1)
    return _Stages(factor, offset, centred, inv_group, gain)


def _normalize(
    x: Tensor, moments: Moments, batch: _Batch, affines: _Affine,
    num_groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """Both stages."""
    s = _stages(moments, batch, affines, num_groups, eps)
    # the value of y where x = mean
    if affines.bias is None:
        at_mean = s.centred * s.gain
    else:
        at_mean = torch.addcmul(affines.bias.view(-1, 1), s.centred, s.gain)
    scale = s.gain * s.factor.view(num_groups, -1)
    at_mean, scale = (t.view(moments.mean.shape) for t in (at_mean, scale))
    return affine.apply(x, moments, scale, at_mean)


def _backward(
    dy: Tensor, x: Tensor, moments: Moments, batch: _Batch, affines: _Affine,
    num_groups: int, eps: float, group: Optional['dist.ProcessGroup'],
    input_gradient: bool,
) -> Tuple[Optional[Tensor], ...]:  # fmt: skip
    """The gradients of x and of the four affine parameters."""
    mean, var, _ = moments
    if x.numel() == 0:
        if batch.count is not None and group is not None and input_gradient:
            dist.all_reduce(mean.new_zeros(2, mean.shape[1]), group=group)
        like = (x, *affines[:3], affines.weight)
        return tuple(t if t is None else torch.zeros_like(t) for t in like)
    s = _stages(moments, batch, affines, num_groups, eps)
    grouped = s.centred.shape
    factor = s.factor.view(grouped[1:])
    length = x.shape[2:].numel()
    dy_sum, moment = affine.reduce(dy, x, mean)
    total, moment = dy_sum.view(grouped), moment.view(grouped)

    # channel stage: with z' = z - M, dz = gain (dy - p - q z')
    size = grouped[2] * length
    # row sums of dy z'
    along_z = torch.addcmul(s.centred * total, moment, factor)
    along_z = along_z.sum(2, keepdim=True)
    group_total = total.sum(2, keepdim=True)
    q = s.inv_group.square().mul_(along_z).div_(size)
    q_row = q * factor
    p_row = torch.addcmul(group_total / size, s.centred, q)
    d_weight = d_bias = None
    if affines.weight is not None:
        d_weight = along_z.mul_(s.inv_group).sum((0, 2))
        d_bias = group_total.sum((0, 2))

    # batch stage: row sums of dz and of dz (x - mean)
    dz_total = torch.sub(total, p_row, alpha=length).mul_(s.gain)
    dz_moment = torch.addcmul(
        moment, q_row, var.view(grouped), value=-length
    ).mul_(s.gain)
    d_shift = dz_total.sum(0).flatten()
    dz_moment.addcmul_(s.offset.view(grouped), dz_total)
    d_factor = dz_moment.sum(0).flatten().mul_(batch.inv_std)

    # dx = dy_scale (dy - mean of dy) + x_scale (x - mean) + at_mean
    dx = None
    if input_gradient:
        dy_scale = s.gain * factor
        x_scale = (q_row * dy_scale).neg_().view(mean.shape)
        dy_scale = dy_scale.view(mean.shape)
        at_mean = dz_total.view(mean.shape) / length
        if batch.count is not None:
            along_mean, along_std = d_shift, d_factor
            if group is not None:
                along_mean, along_std = sums = torch.stack((d_shift, d_factor))
                dist.all_reduce(sums, group=group)
            slope = batch.inv_std * along_std / batch.count
            at_mean.sub_(along_mean / batch.count)
            at_mean.addcmul_(slope, s.offset, value=-1)
            x_scale.addcmul_(slope, s.factor, value=-1)
        at_mean.mul_(s.factor)
        dx = affine.apply_add(
            dy, x, dy_sum / length, moments, dy_scale, x_scale, at_mean
        )
    return (
        dx,
        None if affines.batch_weight is None else d_factor,
        None if affines.batch_bias is None else d_shift,
        d_weight,
        d_bias,
    )


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, batch_weight, batch_bias, weight, bias, mean, var, far,
        batch_mean, inv_std, count, num_groups, eps, group,
    ):  # fmt: skip
        is_tensor = isinstance(count, Tensor)
        ctx.save_for_backward(
            x, mean, var, batch_mean, inv_std, batch_weight, batch_bias,
            weight, count if is_tensor else None,
        )  # fmt: skip
        ctx.far, ctx.count = far, None if is_tensor else count
        ctx.settings = num_groups, eps, group
        if x.numel() == 0:
            return torch.empty_like(x)
        return _normalize(
            x,
            Moments(mean, var, far),
            _Batch(batch_mean, inv_std, count),
            _Affine(batch_weight, batch_bias, weight, bias),
            num_groups,
            eps,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, var, batch_mean, inv_std, *affines, count = ctx.saved_tensors
        gradients = _backward(
            affine.like(dy, x),
            x,
            Moments(mean, var, ctx.far),
            _Batch(batch_mean, inv_std, ctx.count if count is None else count),
            _Affine(*affines, None),  # as in all norms, it may move by then
            *ctx.settings,
            ctx.needs_input_grad[0],
        )
        return (*gradients, *[None] * 9)


def _autocast_off(x: Tensor):
    """A context in which statistics keep their dtype, free if it is so."""
    kind = x.device.type
    if kind == 'meta' or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _to(dtype, *tensors):
    return [
        t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors
    ]


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Optional[Tensor] = None,
    batch_bias: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    training: bool = False,
    estimate: bool = True,
    momentum: Optional[float] = 0.01,
    start: str = 'identity',
    eps: float = 1e-5,
    num_batches_tracked: Optional[Tensor] = None,
    group: Optional['dist.ProcessGroup'] = None,
) -> Tensor:
    r"""Batch-Channel Normalization.

    With :math:`m_{nc}, v_{nc}` the mean and biased variance of ``x`` over its
    spatial positions, the *batch stage* is

    .. math:: z = \gamma_b \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_b

    where, for ``estimate=True`` (micro-batch BCN), :math:`\mu, \sigma^2` are
    running estimates, constants to autograd, that training first moves by

    .. math::
        \hat\mu &\leftarrow \hat\mu + r (\text{mean}_n m - \hat\mu) \\
        \hat\sigma^2 &\leftarrow \hat\sigma^2 + r
            (\text{mean}_n [v + (m - \hat\mu_{\text{old}})^2]
            - \hat\sigma^2)

    and, for ``estimate=False`` (large-batch BCN), those of ``nn.BatchNorm2d``:
    batch statistics in training, running ones (unbiased variance) else. The
    *channel stage* normalizes ``z`` as ``F.group_norm`` does, over the
    channels of a group and space, with one affine pair per **group**:

    .. math:: y = \gamma_c \frac{z - M_{ng}}{\sqrt{V_{ng}+\epsilon}} + \beta_c

    Source: Qiao et al., arXiv:1911.09738, and arXiv:1903.10520v2, alg. 1.

    Args:
        x (Tensor): (N, C, *spatial) with 0 to 3 spatial dimensions, float16,
            bfloat16, float32 or float64. Statistics and all that follows from
            them are computed in float32 (float64 for float64).
        num_groups (int): The number of groups G, a divisor of C.
        running_mean (Tensor): (C), moved in place in training.
        running_var (Tensor): likewise.
        batch_weight (Tensor, optional): :math:`\gamma_b`, (C).
        batch_bias (Tensor, optional): :math:`\beta_b`, (C).
        weight (Tensor, optional): :math:`\gamma_c`, (G).
        bias (Tensor, optional): :math:`\beta_c`, (G); given together with
            ``weight`` or not at all.
        training (bool): Whether estimates move. Default: False.
        estimate (bool): Which batch stage. Default: True.
        momentum (float, optional): The update rate r in [0, 1]; None for the
            cumulative average of all passes. Default: 0.01.
        start (str): How estimates begin. ``'identity'``, as in the paper's
            code: at whatever they hold, 0 and 1 in a new layer. ``'first'``:
            the first pass replaces them. ``'average'``: they are the average
            of all passes until 1 / n, n being their number, falls below r.
            While the rate is above r, the variance becomes that of the
            mixture of old and new, :math:`r^2 (\text{mean}_n m -
            \hat\mu_{\text{old}})^2` less than above; likewise with
            ``momentum=None``. Default: ``'identity'``.
        eps (float): :math:`\epsilon` of both stages. Default: 1e-5.
        num_batches_tracked (Tensor, optional): An integer scalar, counts the
            training passes.
        group (ProcessGroup, optional): In training, take the batch statistics
            over the batches of all its ranks: those of one process with all
            samples, whatever their number on each rank, none included. Every
            rank must make the same passes in the same order; each costs one
            ``all_reduce`` of 2 C + 1 float64 numbers and, with
            ``estimate=False``, one of 2 C numbers in the backward pass. The
            running statistics must be equal on all ranks to begin with.

    Returns:
        Tensor: of the shape, dtype and memory layout of ``x``,
        differentiable once. An empty ``x`` gives an empty result and moves no
        estimate; channels whose batch statistics are not finite keep their
        last finite estimates.

        A pass that ``torch.utils.checkpoint`` repeats in the backward pass
        moves nothing and sees the statistics of the pass that it repeats. A
        pass that something else repeats there moves nothing either, but sees
        the estimates as they then are; that is said once.

    Raises:
        TypeError: if ``x`` is not floating or ``num_groups`` no integer.
        ValueError: if ``x`` is not 2- to 5-dimensional, has another number of
            channels than ``running_mean`` has elements, or ``num_groups``
            does not divide it.
        RuntimeError: if a training pass is exported or traced, or compiled
            as a whole with an activation checkpoint around this.

    Example:
        >>> x = torch.randn(1, 6, 4, 4)
        >>> mean, var = torch.zeros(6), torch.ones(6)
        >>> y = batch_channel_norm(x, 2, mean, var, training=True)
        >>> y.shape, bool((mean != 0).all())
        (torch.Size([1, 6, 4, 4]), True)
    """
    affines = batch_weight, batch_bias, weight, bias
    if affine.exporting():
        if training:
            raise RuntimeError(
                'a training pass of BCN moves its estimates and cannot be '
                'traced or exported: call model.eval() first'
            )
        return _plain(
            x, num_groups, running_mean, running_var, *affines, eps
        )
    if not 2 <= x.dim() <= 5:
        raise ValueError(
            f'expected an input of 2 to 5 dimensions (N, C, '
            f'*spatial), but got shape {tuple(x.shape)}'
        )
    if not x.is_floating_point():
        raise TypeError(f'expected a floating input, but got {x.dtype}')
    if x.shape[1] != running_mean.numel():
        raise ValueError(
            f'expected {running_mean.numel()} channels, but got '
            f'an input of shape {tuple(x.shape)}'
        )
    check_num_groups(num_groups, x.shape[1])
    if not training:
        group = None
    if x.numel() == 0 and group is None:
        # stay in the graph, so that every parameter gets its zero gradient
        anchor = sum(0 * p.sum() for p in affines if p is not None)
        return (x + anchor).to(x.dtype)
    rule = _Rule(training, estimate, momentum, start, eps)
    running = running_mean, running_var, num_batches_tracked
    if torch.compiler.is_compiling() and recomputation.active:
        # only Python knows what a checkpoint repeats
        return _uncompiled(x, num_groups, running, affines, rule, group)
    return _forward(x, num_groups, running, affines, rule, group)


def _forward(x, num_groups, running, affines, rule, group) -> Tensor:
    with _autocast_off(x):
        x = affine.dense(x)
        affines = _to(affine.compute_dtype(x), *affines)
        with torch.no_grad():
            moments = _moments(x)
            batch = _batch(x, moments, running, rule, group)
        if affine.transforming():
            return _differentiable(x, num_groups, batch, affines, rule.eps)
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *affines)
        ):
            return _BatchChannelNorm.apply(
                x, *affines, *moments, *batch, num_groups, rule.eps, group
            )
        if x.numel() == 0:
            return torch.empty_like(x)
        return _normalize(
            x, moments, batch, _Affine(*affines), num_groups, rule.eps
        )


def _uncompiled(*args) -> Tensor:
    # at the call: it imports all of the compiler
    return torch.compiler.disable(_forward)(*args)


def _plain(
    x, num_groups, running_mean, running_var, batch_weight, batch_bias,
    weight, bias, eps,
) -> Tensor:  # fmt: skip
    """Evaluation as an affine and a group norm, for every other runtime."""
    dtype = affine.compute_dtype(x)
    z, mean, var, batch_weight, batch_bias, weight, bias = _to(
        dtype, x, running_mean, running_var, batch_weight, batch_bias, weight,
        bias,
    )  # fmt: skip
    scale, shift = batch_affine(mean, var, batch_weight, batch_bias, eps)
    if weight is not None:  # one pair per channel, without reading a size
        grouped = scale.view(num_groups, -1)
        weight, bias = (
            t.view(-1, 1).expand_as(grouped).flatten() for t in (weight, bias)
        )
    y = affine_group_norm(z, num_groups, scale, shift, weight, bias, eps)
    return _to(x.dtype, y)[0]


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
        x (Tensor): (N, C, *spatial).
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
    if affine.exporting():
        return group_norm_by_axes(
            x, num_groups, weight, bias, eps, scale, shift
        )
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
        x (Tensor): (N, C, *spatial).
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
    given, dtype, channels = x.dtype, affine.compute_dtype(x), _channels(x)
    x, scale, shift, weight, bias = _to(dtype, x, scale, shift, weight, bias)

    def mean_of_rows(t):
        for axis in range(t.dim() - 1, 1, -1):
            t = t.mean(axis, keepdim=True)
        return t

    def grouped(t):  # reads no size, as what is recorded should not
        return None if t is None else t.view(-1, num_groups, size)

    size = channels // num_groups
    mean = mean_of_rows(x)
    x = x - mean
    var = grouped(mean_of_rows(x * x))
    mean = grouped(mean)
    scale, shift, weight, bias = map(grouped, (scale, shift, weight, bias))
    if scale is not None:
        mean, var = mean * scale + shift, var * (scale * scale)
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
    return _to(given, x * factor + mean.reshape(per_row))[0]


def _channels(x: Tensor) -> int:
    """Their number, which is the one size that what is recorded may hold."""
    if not torch.jit.is_tracing():
        return x.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return int(x.shape[1])


def _differentiable(
    x: Tensor, num_groups: int, batch: _Batch, affines, eps: float
) -> Tensor:
    """In plain operators, which ``torch.func`` differentiates as it likes."""
    dtype, affines = affine.compute_dtype(x), _Affine(*affines)
    x, given = x.to(dtype), x.dtype
    mean, inv_std = batch.mean, batch.inv_std
    if batch.count is not None:  # the values are known, but not to autograd
        if isinstance(batch.count, Tensor):
            raise RuntimeError(
                'torch.func cannot differentiate statistics over all ranks'
            )
        axes = (0, *range(2, x.dim()))
        mean = x.mean(axes)
        inv_std = (x.var(axes, correction=0) + eps).rsqrt()
    scale = inv_std
    if affines.batch_weight is not None:
        scale = scale * affines.batch_weight
    shift = -mean * scale
    if affines.batch_bias is not None:
        shift = shift + affines.batch_bias
    weight, bias = (
        t if t is None else t.repeat_interleave(x.shape[1] // num_groups)
        for t in (affines.weight, affines.bias)
    )
    y = affine_group_norm(x, num_groups, scale, shift, weight, bias, eps)
    return y.to(given)


@torch.library.custom_op('bcn_mm::snapshot', mutates_args=())
def _snapshot(t: Tensor) -> Tensor:
    """A clone that compilers must keep for the backward pass.

    AOTAutograd recomputes there what is cheap, and takes no notice that the
    buffers which estimates are computed from have moved by then.
    """
    return t.clone()


@_snapshot.register_fake
def _(t: Tensor) -> Tensor:
    if recomputation.compiled():
        raise RuntimeError(
            'torch.compile recomputes what is checkpointed inside of it with '
            'estimates that have moved: compile what is checkpointed instead, '
            'checkpoint(torch.compile(block), x)'
        )
    return torch.empty_like(t)


class _Rule(NamedTuple):
    """How a pass moves the running statistics, and whether."""

    training: bool
    estimate: bool
    momentum: Optional[float]
    start: str
    eps: float


def _moments(x: Tensor) -> Moments:
    if x.numel() > 0:
        return affine.moments(x)
    return Moments(
        *x.new_zeros(2, 0, x.shape[1], dtype=affine.compute_dtype(x))
    )


def _batch(
    x: Tensor, moments: Moments, running: tuple, rule: _Rule,
    group: Optional['dist.ProcessGroup'],
) -> _Batch:  # fmt: skip
    """What the batch stage normalizes with; moves the running statistics."""
    step = partial(_step, x, moments, running, rule, group)
    if rule.training and recomputation.by_others():
        warnings.warn(
            'BCN is recomputed in the backward pass by something other than '
            'torch.utils.checkpoint: it sees the estimates as they are now, '
            'which is exact for layers that are called once a step',
            stacklevel=5,
        )
        return step(move=False)
    return recomputation.once(step)


def _step(
    x: Tensor, moments: Moments, running: tuple, rule: _Rule,
    group: Optional['dist.ProcessGroup'], move: bool = True,
) -> _Batch:  # fmt: skip
    batch = None
    if rule.training and (move or not rule.estimate):
        mean, var, count = _batch_statistics(x, moments, running, rule, group)
        if not rule.estimate:
            batch = _Batch(mean, (var + rule.eps).rsqrt(), count)
            # unbiased, as in nn.BatchNorm2d
            var = var * (count / _at_least_one(count - 1))
        if move:
            _move(running, mean, var, rule)
    return batch or _running(running, rule, moments.mean.dtype)


def _running(running: tuple, rule: _Rule, dtype: torch.dtype) -> _Batch:
    """The running statistics, as they are."""
    # a copy: a later pass moves the buffer in place, and the backward pass of
    # this one must not see that
    mean, var = running[:2]
    if rule.training and torch.compiler.is_compiling():
        mean, var = _snapshot(mean), _snapshot(var)
    else:
        mean = mean.clone()
    mean, var = _to(dtype, mean, var)
    return _Batch(mean, (var + rule.eps).rsqrt_(), None)


def _batch_statistics(
    x, moments, running, rule, group
) -> Tuple[Tensor, Tensor, Union[int, Tensor]]:
    """Mean and biased variance of this batch, (C), and of how many values."""
    mean, var, _ = moments
    running_mean = running[0]
    if group is not None:
        return _over_ranks(
            mean, var, running_mean, x.shape[2:].numel(), rule.estimate, group
        )
    batch_mean = _mean_of_samples(mean)
    about = mean - (running_mean if rule.estimate else batch_mean)
    if not rule.estimate and mean.shape[0] > 1:
        # without the rounding of the mean, which a small variance magnifies
        rest = about.mean(0)
        batch_mean, about = batch_mean + rest, about - rest
    batch_var = _mean_of_samples(torch.addcmul(var, about, about))
    return batch_mean, batch_var, x.numel() // x.shape[1]


def _at_least_one(count):
    if isinstance(count, Tensor):
        return count.clamp_min(1)
    return max(count, 1)


def _move(
    running: tuple, batch_mean: Tensor, batch_var: Tensor, rule: _Rule
) -> None:
    """Move the running statistics towards those of a batch."""
    running_mean, running_var, num_batches_tracked = running
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    rate, large = _rate(
        rule.momentum, rule.start, num_batches_tracked, running_mean.dtype
    )
    if rule.estimate and large is not None:
        # at a rate that is not small, the variance of what the estimates are
        # a mean of
        old = (batch_mean - running_mean).square_()
        batch_var = torch.addcmul(batch_var, large, old, value=-1)
    _update(running_mean, running_var, batch_mean, batch_var, rate)


def _over_ranks(
    mean, var, running_mean, length, estimate, group
) -> Tuple[Tensor, Tensor, Tensor]:
    """The batch statistics over a process group, in one ``all_reduce``.

    Ranks add up what makes a mean and a variance about the running mean,
    which is the same on all of them, in float64: 8 (2 C + 1) bytes. Samples
    weigh the same with ``estimate``, positions without, as in one process.

    Returns:
        tuple[Tensor, Tensor, Tensor]: mean and biased variance, both (C), the
        latter about the running mean with ``estimate``, not finite where no
        rank has a value; and the total weight.
    """
    reference = running_mean.to(torch.float64)
    about = mean.to(torch.float64) - reference
    each = 1 if estimate else length
    sums = torch.cat(
        (
            about.sum(0) * each,
            torch.addcmul(var.to(torch.float64), about, about).sum(0) * each,
            about.new_full((1,), about.shape[0] * each),
        )
    )
    dist.all_reduce(sums, group=group)
    count = sums[-1]
    first, second = sums[:-1].view(2, -1) / count
    batch_var = second if estimate else (second - first**2).clamp_min_(0)
    return tuple(
        t.to(mean.dtype) for t in (reference + first, batch_var, count)
    )


def _mean_of_samples(t: Tensor) -> Tensor:
    return t[0] if t.shape[0] == 1 else t.mean(0)
