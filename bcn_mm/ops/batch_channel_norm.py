"""Batch-Channel Normalization in one pass.

Both stages are affine in ``x`` once the moments of every (sample, channel)
are known, so the forward pass is ``moments -> algebra -> apply`` and the
backward pass ``reduce -> algebra -> apply_add`` (see :mod:`.affine`). The
algebra below works on (N, C) and (N, G) tensors; of full size only ``x`` is
kept for the backward pass.
"""

from collections import deque
from contextlib import nullcontext
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import affine


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
    """Raise a ValueError unless ``num_groups`` divides ``num_channels``."""
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f'num_groups must be a divisor of the number of channels, but '
            f'num_groups={num_groups} does not divide {num_channels}'
        )


class RecentEstimates:
    """The estimates that recent training passes of one layer normalized with.

    Activation checkpointing runs a forward pass a second time, inside the
    backward pass. The second run must use the estimates of the first, yet a
    layer that was called again in between (a head shared by pyramid levels)
    has newer ones. Equal input gives equal batch means, so the pass being
    repeated is the one with the nearest batch mean, which is found on the
    device without a host synchronisation.

    Args:
        maxlen (int): How many passes to remember, at three C-sized tensors
            each. Default: 16.
    """

    def __init__(self, maxlen: int = 16) -> None:
        self._passes = deque(maxlen=maxlen)

    def __reduce__(self):
        # copies and pickles of a layer start without memories
        return type(self), (self._passes.maxlen,)

    def record(self, batch_mean: Tensor, mean: Tensor, var: Tensor) -> None:
        self._passes.append((batch_mean, mean, var))

    def recall(self, batch_mean: Tensor) -> Optional[Tuple[Tensor, Tensor]]:
        """The estimates of the pass with this batch mean; None if empty."""
        if not self._passes:
            return None
        if len(self._passes) == 1:
            return self._passes[0][1:]
        means, *estimates = map(torch.stack, zip(*self._passes))
        nearest = (means - batch_mean).abs_().sum(1).argmin().view(1)
        return tuple(e.index_select(0, nearest)[0] for e in estimates)


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Optional[Tensor],
    batch_mean: Tensor,
    batch_var: Tensor,
    momentum: Optional[float],
) -> None:
    """Move the estimates in place, channels with non-finite news excepted."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        if num_batches_tracked is None:
            raise ValueError(
                'momentum=None, the cumulative average, needs '
                'num_batches_tracked'
            )
        momentum = num_batches_tracked.to(batch_mean.dtype).reciprocal()
    mean = running_mean + momentum * (batch_mean - running_mean)
    var = running_var + momentum * (batch_var - running_var)
    mean, var = mean.to(running_mean.dtype), var.to(running_var.dtype)
    finite = torch.isfinite(mean) & torch.isfinite(var)
    running_mean.copy_(torch.where(finite, mean, running_mean))
    running_var.copy_(torch.where(finite, var, running_var))


class _Stages(NamedTuple):
    """What both passes need to know beside ``x`` and its moments."""

    factor: Tensor  # (C): batch_weight / sqrt(var + eps)
    inv_std: Tensor  # (C): 1 / sqrt(var + eps)
    centred: Tensor  # (N, G, D): row means of z about the group mean
    inv_group: Tensor  # (N, G, 1): 1 / sqrt(group variance of z + eps)
    scale: Tensor  # (N, C): dy/dx with all statistics held fixed


def _stages(
    mean, var, mu, sigma2, batch_weight, batch_bias, weight, num_groups, eps
) -> _Stages:
    n, c = mean.shape
    grouped = (n, num_groups, c // num_groups)
    inv_std = torch.rsqrt(sigma2 + eps)
    factor = inv_std if batch_weight is None else batch_weight * inv_std
    z = factor * (mean - mu)
    if batch_bias is not None:
        z = z + batch_bias
    z = z.view(grouped)
    centred = z - z.mean(2, keepdim=True)
    within = (factor.square() * var).view(grouped)
    inv_group = torch.rsqrt((within + centred.square()).mean(2, True) + eps)
    scale = inv_group * factor.view(grouped[1:])
    if weight is not None:
        scale = scale * weight.view(-1, 1)
    return _Stages(factor, inv_std, centred, inv_group, scale.view(n, c))


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        batch_weight,
        batch_bias,
        weight,
        bias,
        mean,
        var,
        mu,
        sigma2,
        num_groups,
        eps,
        batch_statistics,
    ):
        known = mean, var, mu, sigma2, batch_weight, batch_bias, weight
        s = _stages(*known, num_groups, eps)
        at_mean = s.centred * s.inv_group  # the value of y where x = mean
        if weight is not None:
            at_mean = at_mean * weight.view(-1, 1)
        if bias is not None:
            at_mean = at_mean + bias.view(-1, 1)
        ctx.save_for_backward(x, *known)
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.batch_statistics = batch_statistics
        at_mean = at_mean.view_as(mean)
        if x.shape[2:].numel() == 1:
            # x is its mean; with no variance the scale is as large as 1 / eps
            # and scale * x would be all rounding
            return torch.empty_like(x).copy_(at_mean.view(x.shape))
        return affine.apply(x, s.scale, at_mean - s.scale * mean)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *known = ctx.saved_tensors
        mean, var, mu, _, batch_weight, batch_bias, weight = known
        s = _stages(*known, ctx.num_groups, ctx.eps)
        n, c = mean.shape
        grouped = s.centred.shape
        length = x.numel() // (n * c)
        dy = affine.like(dy, x)
        total, moment = affine.reduce(dy, x, mean)  # (N, C)

        # channel stage: with z' = z - M,
        # dz = weight inv_group (dy - p - q z'), p and q as below
        factor = s.factor.view(grouped[1:])
        total_g = total.view(grouped)
        # row sums of dy z'
        along_z = factor * moment.view(grouped) + s.centred * total_g
        size = grouped[2] * length
        p = total_g.sum(2, True) / size
        q = along_z.sum(2, True) * s.inv_group.square() / size
        p_row = (p + q * s.centred).view(n, c)
        q_row = (q * factor).view(n, c)
        d_weight = d_bias = None
        if weight is not None:
            d_weight = (along_z * s.inv_group).sum((0, 2))
            d_bias = total_g.sum((0, 2))

        # batch stage: row sums of dz and of dz (x - mean)
        z_scale = s.inv_group
        if weight is not None:
            z_scale = z_scale * weight.view(-1, 1)
        z_scale = z_scale.expand(grouped).reshape(n, c)
        dz_total = z_scale * (total - length * p_row)
        dz_moment = z_scale * (moment - length * q_row * var)
        offset = mean - mu
        d_shift = dz_total.sum(0)
        d_factor = s.inv_std * (dz_moment + offset * dz_total).sum(0)

        # dx = scale dy + x_scale (x - mean) + at_mean
        dx = None
        if ctx.needs_input_grad[0]:
            x_scale = -s.scale * q_row
            at_mean = -s.scale * p_row
            if ctx.batch_statistics:
                count = n * length
                slope = s.factor * s.inv_std * d_factor / count
                x_scale = x_scale - slope
                at_mean = at_mean - s.factor * d_shift / count - slope * offset
            dx = affine.apply_add(
                dy, x, s.scale, x_scale, at_mean - x_scale * mean
            )
        return (
            dx,
            None if batch_weight is None else d_factor,
            None if batch_bias is None else d_shift,
            d_weight,
            d_bias,
            *[None] * 7,
        )


def _autocast_off(x: Tensor):
    """A context in which statistics keep their dtype, free if it is so."""
    kind = x.device.type
    if kind == 'meta' or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _to(dtype, *tensors):
    return [None if t is None else t.to(dtype) for t in tensors]


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
    eps: float = 1e-5,
    num_batches_tracked: Optional[Tensor] = None,
    recent: Optional[RecentEstimates] = None,
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
        eps (float): :math:`\epsilon` of both stages. Default: 1e-5.
        num_batches_tracked (Tensor, optional): An integer scalar, counts the
            training passes.
        recent (:obj:`RecentEstimates`, optional): A layer's memory. With it
            activation checkpointing is exact: a forward pass that autograd
            repeats inside a backward pass moves nothing and sees the
            estimates of the pass that it repeats.

    Returns:
        Tensor: of the shape, dtype and memory layout of ``x``,
        differentiable once. An empty ``x`` gives an empty result and moves no
        estimate; channels whose batch statistics are not finite keep their
        last finite estimates.

    Raises:
        ValueError: if ``x`` is not 2- to 5-dimensional, has another number of
            channels than ``running_mean`` has elements, or ``num_groups``
            does not divide it.

    Example:
        >>> x = torch.randn(1, 6, 4, 4)
        >>> mean, var = torch.zeros(6), torch.ones(6)
        >>> y = batch_channel_norm(x, 2, mean, var, training=True)
        >>> y.shape, bool((mean != 0).all())
        (torch.Size([1, 6, 4, 4]), True)
    """
    if not 2 <= x.dim() <= 5:
        raise ValueError(
            f'expected an input of 2 to 5 dimensions (N, C, '
            f'*spatial), but got shape {tuple(x.shape)}'
        )
    if x.shape[1] != running_mean.numel():
        raise ValueError(
            f'expected {running_mean.numel()} channels, but got '
            f'an input of shape {tuple(x.shape)}'
        )
    check_num_groups(num_groups, x.shape[1])
    affines = batch_weight, batch_bias, weight, bias
    if x.numel() == 0:
        # stay in the graph, so that every parameter gets its zero gradient
        anchor = sum(0 * p.sum() for p in affines if p is not None)
        return (x + anchor).to(x.dtype)
    with _autocast_off(x):
        dtype = affine.compute_dtype(x)
        x = affine.dense(x)
        with torch.no_grad():
            mean, var = affine.moments(x)
            mu, sigma2 = _to(
                dtype,
                *_statistics(
                    x,
                    mean,
                    var,
                    running_mean,
                    running_var,
                    num_batches_tracked,
                    training,
                    estimate,
                    momentum,
                    recent,
                ),
            )
        return _BatchChannelNorm.apply(
            x,
            *_to(dtype, *affines),
            mean,
            var,
            mu,
            sigma2,
            num_groups,
            eps,
            training and not estimate,
        )


def _statistics(
    x,
    mean,
    var,
    running_mean,
    running_var,
    num_batches_tracked,
    training,
    estimate,
    momentum,
    recent,
) -> Tuple[Tensor, Tensor]:
    """The mean and variance of the batch stage; moves the running ones."""
    if not training:
        # not the buffers: a later training pass moves them in place, and the
        # backward pass of this one must not see that
        return running_mean.clone(), running_var.clone()
    batch_mean = mean.mean(0)
    repeated = recent is not None and _inside_backward()
    if estimate:
        if repeated:
            seen = recent.recall(batch_mean)
            return seen or (running_mean.clone(), running_var.clone())
        batch_var = (var + (mean - running_mean).square()).mean(0)
        _update(
            running_mean,
            running_var,
            num_batches_tracked,
            batch_mean,
            batch_var,
            momentum,
        )
        estimates = running_mean.clone(), running_var.clone()
        if recent is not None:
            recent.record(batch_mean, *estimates)
        return estimates
    batch_var = (var + (mean - batch_mean).square()).mean(0)
    if not repeated:
        count = x.numel() // x.shape[1]
        _update(
            running_mean,
            running_var,
            num_batches_tracked,
            batch_mean,
            batch_var * (count / max(count - 1, 1)),
            momentum,
        )
    return batch_mean, batch_var


def _inside_backward() -> bool:
    """Whether autograd is running this forward pass, to recompute it."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._current_graph_task_id() != -1
    )
