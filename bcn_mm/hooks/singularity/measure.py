"""What is taken of one call of a norm, on its device."""

from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._tracing import TensorTracer
from ...layers import BCN
from ...ops.kernels import kernels_for
from ...ops.layout import compute_dtype, dense

_RELUS = {
    F.relu,
    F.relu_,
    F.relu6,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
}
_HARDTANHS = {F.hardtanh, F.hardtanh_}  # what nn.ReLU6 calls


class Measurement(NamedTuple):
    """What one call of a norm leaves behind, still on its device.

    Attributes:
        num_positions (int): Samples times spatial size.
        level (int): The call's, of a BCN that pyramid levels share.
        rows (Tensor): (3, C): mean, biased variance and number of positives
            of the output; (5, C) for a BCN: mean and biased variance of the
            input as well.
    """

    num_positions: int
    level: int
    rows: Tensor


@torch.no_grad()
def measure(norm: nn.Module, x: Tensor, output: Tensor) -> Optional[Measurement]:
    """Measure a call of a norm.

    Args:
        norm (nn.Module): The norm.
        x (Tensor): What it was called with, ``(N, C, *spatial)``.
        output (Tensor): What it returned.

    Returns:
        Measurement, optional: None if the output is empty.
    """
    if output.numel() == 0:
        return None
    rows, level = [*_moments(output), _positives(output)], 0
    if isinstance(norm, BCN):
        rows, level = [*rows, *_moments(x)], norm.level
    num_positions = output.numel() // output.shape[1]
    return Measurement(num_positions, level, torch.stack(rows))


def _moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, (C)."""
    x = dense(x)
    mean, var, _ = kernels_for(x).moments(x)
    # every sample has as many positions
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


def _positives(x: Tensor) -> Tensor:
    """How many values of every channel are positive, (C)."""
    dtype = compute_dtype(x)
    if kernels_for(x).on_cpu:
        # sums of floats take a tenth of the time of sums of bools on the CPU
        positive = torch.gt(x, 0, out=torch.empty_like(x, dtype=dtype))
    else:
        positive = x > 0
    positive = positive.flatten(2) if x.dim() > 2 else positive.unsqueeze(2)
    return positive.sum(2, dtype=dtype).sum(0)


def _lower_bound(args: Tuple, kwargs: dict) -> float:
    """Of a call of ``F.hardtanh``."""
    return args[1] if len(args) > 1 else kwargs.get('min_val', -1.0)


class ReLUTracer(TensorTracer):
    """Finds out which norms' outputs go into a ReLU, or ReLU6.

    Those that something has written into do not count: ``out += identity``
    leaves a residual block's last norm's output the same object, but no longer
    that norm's output.

    Args:
        feeds (dict): Receives, as keys and in the order in which they do, the
            names of those norms whose outputs were followed by these names.
    """

    def __init__(self, feeds: Dict[str, None]) -> None:
        super().__init__()
        self.feeds = feeds

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RELUS or (func in _HARDTANHS and _lower_bound(args, kwargs) == 0):
            x = args[0] if args else kwargs['input']
            name = self.label_of(x, unwritten=True)
            if name is not None:
                self.feeds[name] = None
        return func(*args, **kwargs)
