r"""What moves between passes: the running statistics and how they move.

The update rule of the estimates is :func:`_move`; where a batch is spread
over a process group, its statistics are :func:`_over_ranks`.
"""

import warnings
from functools import partial
from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from . import recomputation
from ._compat import is_compiling, opaque_operator
from .layout import to_dtype
from .stages import Batch, Moments

#: How estimates begin: see ``start`` of :func:`.batch_channel_norm`.
STARTS = ('identity', 'first', 'average')


class Running(NamedTuple):
    """The buffers of a layer, moved in place."""

    mean: Tensor  # (C)
    var: Tensor  # (C)
    num_batches_tracked: Optional[Tensor]  # an integer scalar


class Rule(NamedTuple):
    """How a pass moves the running statistics, and whether."""

    training: bool
    estimate: bool
    momentum: Optional[float]
    start: str
    eps: float


def check_start(start: str) -> None:
    """Raise a ValueError unless ``start`` is one of :data:`STARTS`."""
    if start not in STARTS:
        raise ValueError(f'start must be one of {", ".join(STARTS)}, but got {start!r}')


def batch_of(
    moments: Moments,
    length: int,
    running: Running,
    rule: Rule,
    group: Optional['dist.ProcessGroup'] = None,
) -> Batch:
    """What the batch stage normalizes with; in training, moves the estimates.

    A pass that activation checkpointing repeats moves nothing and gets what
    its first run got.

    Args:
        moments (Moments): Of the input.
        length (int): L, its values in each row.
        running (Running): The estimates.
        rule (Rule): How they move.
        group (ProcessGroup, optional): Whose batch it is. Default: None, of
            this process alone.
    """
    step = partial(_step, moments, length, running, rule, group)
    if repeated_by_others(rule):
        return step(move=False)
    return recomputation.once(step)


def repeated_by_others(rule: Rule) -> bool:
    """Whether this pass is repeated by what has no tape; says so if it is."""
    if not (rule.training and recomputation.by_others()):
        return False
    warnings.warn(
        'BCN is recomputed in the backward pass by something other than '
        'torch.utils.checkpoint: it sees the estimates as they are now, '
        'which is exact for layers that are called once a step',
        stacklevel=6,
    )
    return True


def unmoving(rule: Rule) -> Rule:
    """The same rule for a pass that moves nothing."""
    if rule.estimate:
        return rule._replace(training=False)
    return rule._replace(momentum=0.0, start='identity')


def _step(
    moments: Moments,
    length: int,
    running: Running,
    rule: Rule,
    group: Optional['dist.ProcessGroup'],
    move: bool = True,
) -> Batch:
    batch = None
    if rule.training and (move or not rule.estimate):
        mean, var, num_values = _statistics(moments, length, running, rule, group)
        if not rule.estimate:
            batch = Batch(mean, (var + rule.eps).rsqrt(), num_values)
            # unbiased, as in nn.BatchNorm2d
            var = var * (num_values / _at_least_one(num_values - 1))
        if move:
            _move(running, mean, var, rule, num_values)
    return batch or _batch_of_estimates(running, rule, moments.mean.dtype)


def _batch_of_estimates(running: Running, rule: Rule, dtype: torch.dtype) -> Batch:
    # a copy: a later pass moves the buffer in place, and the backward pass of
    # this one must not see that
    mean, var, _ = running
    if rule.training and is_compiling():
        mean, var = _snapshot(mean), _snapshot(var)
    else:
        mean = mean.clone()
    mean, var = to_dtype(dtype, mean, var)
    return Batch(mean, (var + rule.eps).rsqrt_(), None)


def _fake_snapshot(t: Tensor) -> Tensor:
    if recomputation.compiled():
        raise RuntimeError(
            'torch.compile recomputes what is checkpointed inside of it with '
            'estimates that have moved: compile what is checkpointed instead, '
            'checkpoint(torch.compile(block), x)'
        )
    return torch.empty_like(t)


# A clone that compilers must keep for the backward pass: AOTAutograd recomputes
# there what is cheap, and takes no notice that the buffers which estimates are
# computed from have moved by then.
_snapshot = opaque_operator(
    'bcn_mm::snapshot(Tensor t) -> Tensor', torch.clone, _fake_snapshot
)


def _statistics(
    moments: Moments,
    length: int,
    running: Running,
    rule: Rule,
    group: Optional['dist.ProcessGroup'],
) -> Tuple[Tensor, Tensor, Union[int, Tensor]]:
    """Mean and biased variance of this batch, (C), and of how many values."""
    mean, var, _ = moments
    if group is not None:
        return _over_ranks(mean, var, running.mean, length, rule.estimate, group)
    if mean.shape[0] == 1:
        return mean[0], var[0], length
    batch_mean = mean.mean(0)
    offset = mean - batch_mean
    # without the rounding of the mean, which a small variance magnifies
    rest = offset.mean(0)
    batch_mean, offset = batch_mean + rest, offset - rest
    batch_var = torch.addcmul(var, offset, offset).mean(0)
    return batch_mean, batch_var, mean.shape[0] * length


def _at_least_one(number: Union[int, Tensor]) -> Union[int, Tensor]:
    if isinstance(number, Tensor):
        return number.clamp_min(1)
    return max(number, 1)


def _move(
    running: Running,
    batch_mean: Tensor,
    batch_var: Tensor,
    rule: Rule,
    num_values: Union[int, Tensor],
) -> None:
    """Move the running statistics towards those of a batch.

    Channels whose statistics are not finite stay; a batch without values, which
    only a group of ranks can have here, is no pass.
    """
    if running.num_batches_tracked is not None:
        passes = num_values > 0 if isinstance(num_values, Tensor) else 1
        running.num_batches_tracked.add_(passes)
    rate, large = _rate(
        rule.momentum,
        rule.start,
        running.num_batches_tracked,
        running.mean.dtype,
    )
    if rule.estimate:
        # about the estimate; at a rate that is not small, the variance of what
        # the estimates are a mean of. Not as a difference of large squares.
        offset = batch_mean - running.mean
        part = offset
        if large is not None:
            part = torch.addcmul(offset, large, offset, value=-1)
        batch_var = torch.addcmul(batch_var, part, offset)
    # the variance is of values about a mean: finite only if that is
    finite = batch_var < float('inf')
    if running.mean.dtype != batch_mean.dtype:
        # unless the buffers' dtype overflows
        batch_mean = batch_mean.to(running.mean.dtype)
        batch_var = batch_var.to(running.var.dtype)
        finite = (batch_mean.abs() + batch_var) < float('inf')
    for buffer, value in zip(running[:2], (batch_mean, batch_var)):
        buffer.lerp_(torch.where(finite, value, buffer), rate)


def _rate(
    momentum: Optional[float],
    start: str,
    passes: Optional[Tensor],
    dtype: torch.dtype,
) -> Tuple[Union[float, Tensor], Optional[Tensor]]:
    """How far the estimates move in this pass, the ``passes``-th.

    Returns:
        tuple: the rate, and the same where it is above ``momentum`` and 0
        elsewhere, or None where it never is.
    """
    if momentum is not None and start == 'identity':
        return momentum, None
    passes = counted(passes, momentum, start)
    if momentum is None or start == 'average':
        # none yet: a batch without values, of which nothing moves
        rate = passes.to(dtype).clamp_min(1).reciprocal()
    if momentum is None:
        return rate, rate
    if start == 'average':
        rate = rate.clamp_min(momentum)
    else:
        rate = (passes == 1).to(dtype).clamp_min(momentum)
    return rate, rate * (rate > momentum)


def counted(passes: Optional[Tensor], momentum: Optional[float], start: str) -> Tensor:
    """The number of passes, which a rate that changes with it needs.

    Raises:
        ValueError: if there is none.
    """
    if passes is None:
        raise ValueError(
            f'momentum={momentum} with start={start!r} needs num_batches_tracked'
        )
    return passes


def _over_ranks(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    length: int,
    estimate: bool,
    group: 'dist.ProcessGroup',
) -> Tuple[Tensor, Tensor, Tensor]:
    """The batch statistics over a process group, in one ``all_reduce``.

    Ranks add up offsets from the running mean, which is the same on all of
    them, and their squares, in float64: 8 (2 C + 1) bytes. Samples
    weigh the same with ``estimate``, positions without, as in one process.

    Returns:
        tuple[Tensor, Tensor, Tensor]: mean and biased variance, both (C), not
        finite where no rank has a value; and the total weight.
    """
    reference = running_mean.to(torch.float64)
    offset = mean.to(torch.float64) - reference
    weight = 1 if estimate else length
    second = torch.addcmul(var.to(torch.float64), offset, offset)
    sums = torch.cat(
        (
            offset.sum(0) * weight,
            second.sum(0) * weight,
            offset.new_full((1,), offset.shape[0] * weight),
        )
    )
    dist.all_reduce(sums, group=group)
    num_values = sums[-1]
    first, second = sums[:-1].view(2, -1) / num_values
    batch_var = (second - first**2).clamp_min_(0)
    batch_mean, dtype = reference + first, mean.dtype
    return batch_mean.to(dtype), batch_var.to(dtype), num_values.to(dtype)
