r"""The algebra of the two stages, on (N, C) and (N, G) tensors.

Pure functions: what :func:`forward` makes of the moments of every row is the
affine ``y = scale (x - mean) + at_mean``, and :func:`backward_reduce` and
:func:`backward_input` turn row sums into gradients. No tensor of full size
comes here. A row is one (sample, channel).
"""

from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor


class Spec(NamedTuple):
    """What does not change from pass to pass."""

    num_groups: int
    eps: float  # of both stages
    relu: bool = False  # whether the result is max(0, .) of both stages'


class Moments(NamedTuple):
    """Of every row: (N, C) tensors, float64 for float64 input, else float32.

    Empty inputs have none, (0, C).
    """

    mean: Tensor
    var: Tensor  # biased
    # Whether a row has a mean so far from 0, in standard deviations, that it
    # has to be centred before it is scaled; only a backend that asks knows
    far: bool = True


class Batch(NamedTuple):
    """What the batch stage of one pass normalizes with."""

    mean: Tensor  # (C)
    inv_std: Tensor  # (C): 1 / sqrt(variance + eps)
    # How many values the two are statistics of, over all ranks if there is a
    # process group; None if they are constants to autograd
    num_values: Optional[Union[int, Tensor]]


class Affine(NamedTuple):
    """The learnable parameters of both stages, or their gradients."""

    batch_weight: Optional[Tensor]  # (C)
    batch_bias: Optional[Tensor]  # (C)
    weight: Optional[Tensor]  # (G)
    bias: Optional[Tensor]  # (G)


class Stages(NamedTuple):
    """What both directions need to know beside the moments."""

    factor: Tensor  # (C): batch_weight / sqrt(batch variance + eps)
    offset: Tensor  # (N, C): row means of x about the batch stage's mean
    centred: Tensor  # (N, G, D): row means of z about the group mean
    inv_group: Tensor  # (N, G, 1): 1 / sqrt(group variance of z + eps)
    gain: Tensor  # (N, G, 1): dy/dz with all statistics held fixed


class Rows(NamedTuple):
    """What :func:`backward_input` needs of :func:`backward_reduce`."""

    stages: Stages
    dy_sum: Tensor  # (N, C): row sums of dy
    dz_sum: Tensor  # (N, G, D): row sums of dz
    q: Tensor  # (N, G, D): dz = gain (dy - p - q (x - mean))


class Sums(NamedTuple):
    """What a backward pass adds up.

    The gradients of the parameters; those of the batch stage's shift and
    scale, which process groups add up over their ranks; and what the gradient
    of the input is made of.
    """

    affine: Affine
    along: Tuple[Tensor, Tensor]  # each (C)
    rows: Optional[Rows]


class InputGradient(NamedTuple):
    """``dx = dy_scale (dy - dy_mean) + x_scale (x - mean) + at_mean``."""

    dy_mean: Tensor  # (N, C), as all that follow
    dy_scale: Tensor
    x_scale: Tensor
    at_mean: Tensor


def _stages(moments: Moments, batch: Batch, affine: Affine, spec: Spec) -> Stages:
    grouped = (moments.mean.shape[0], spec.num_groups, -1)
    factor, offset = batch.inv_std, moments.mean - batch.mean
    if affine.batch_weight is not None:
        factor = affine.batch_weight * factor
    if affine.batch_bias is None:
        z = offset * factor
    else:
        z = torch.addcmul(affine.batch_bias, offset, factor)
    z = z.view(grouped)
    centred = z.sub_(z.mean(2, keepdim=True))
    spread = (moments.var * factor.square()).view(grouped)
    spread = spread.addcmul_(centred, centred).mean(2, keepdim=True)
    inv_group = gain = spread.add_(spec.eps).rsqrt_()
    if affine.weight is not None:
        gain = inv_group * affine.weight.view(-1, 1)
    return Stages(factor, offset, centred, inv_group, gain)


def forward(
    moments: Moments, batch: Batch, affine: Affine, spec: Spec
) -> Tuple[Tensor, Tensor]:
    """Both stages as one affine of ``x - mean``.

    Returns:
        tuple[Tensor, Tensor]: ``scale`` and ``at_mean``, both (N, C).
    """
    s = _stages(moments, batch, affine, spec)
    if affine.bias is None:
        at_mean = s.centred * s.gain
    else:
        at_mean = torch.addcmul(affine.bias.view(-1, 1), s.centred, s.gain)
    scale = s.gain * s.factor.view(spec.num_groups, -1)
    return scale.view(moments.mean.shape), at_mean.view(moments.mean.shape)


def backward_reduce(
    dy_sum: Tensor,
    moment: Tensor,
    length: int,
    moments: Moments,
    batch: Batch,
    affine: Affine,
    spec: Spec,
) -> Sums:
    """From row sums to the gradients of the parameters.

    Args:
        dy_sum (Tensor): (N, C), row sums of dy.
        moment (Tensor): (N, C), row sums of dy (x - mean).
        length (int): L, the values in a row.
        moments, batch, affine, spec: Those of the forward pass.
    """
    s = _stages(moments, batch, affine, spec)
    grouped = s.centred.shape
    factor = s.factor.view(grouped[1:])
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
    if affine.weight is not None:
        d_weight = along_z.mul_(s.inv_group).sum((0, 2))
        d_bias = group_total.sum((0, 2))

    # batch stage: row sums of dz and of dz (x - mean)
    dz_sum = torch.sub(total, p_row, alpha=length).mul_(s.gain)
    dz_moment = torch.addcmul(
        moment, q_row, moments.var.view(grouped), value=-length
    ).mul_(s.gain)
    d_shift = dz_sum.sum(0).flatten()
    dz_moment.addcmul_(s.offset.view(grouped), dz_sum)
    d_factor = dz_moment.sum(0).flatten().mul_(batch.inv_std)
    return Sums(
        Affine(
            None if affine.batch_weight is None else d_factor,
            None if affine.batch_bias is None else d_shift,
            d_weight,
            d_bias,
        ),
        (d_shift, d_factor),
        Rows(s, dy_sum, dz_sum, q_row),
    )


def backward_input(
    sums: Sums, length: int, moments: Moments, batch: Batch
) -> InputGradient:
    """From the sums, over all ranks if there are several, to dx."""
    assert sums.rows is not None  # those of empty inputs do not come here
    s, dy_sum, dz_sum, q_row = sums.rows
    shape = moments.mean.shape
    dy_scale = s.gain * s.factor.view(s.centred.shape[1:])
    x_scale = (q_row * dy_scale).neg_().view(shape)
    at_mean = dz_sum.view(shape) / length
    if batch.num_values is not None:
        along_mean, along_std = sums.along
        slope = batch.inv_std * along_std / batch.num_values
        at_mean.sub_(along_mean / batch.num_values)
        at_mean.addcmul_(slope, s.offset, value=-1)
        x_scale.addcmul_(slope, s.factor, value=-1)
    return InputGradient(
        dy_sum / length,
        dy_scale.view(shape),
        x_scale,
        at_mean.mul_(s.factor),
    )
