"""How a tensor is computed again, bit for bit, instead of being kept.

``y = A x + B``, row by row, follows from what a norm keeps for its own backward pass,
and so do an activation of ``y``, its sum with something that is kept anyway, as at the
end of a residual block, and a standardized weight from the weight.
"""

from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    NamedTuple,
    Optional,
    Union,
)

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import Eager
from .stages import Moments

if TYPE_CHECKING:
    from .rematerialization import Kept


class Recipe:
    """How a tensor is computed again, bit for bit.

    Attributes:
        depth (int): How many sums it takes, one after the other.
        awaited (int): How much of what autograd was handed has not asked yet.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.awaited = 0

    def compute(self) -> Tensor:
        """A fresh tensor of the same values; autograd is off."""
        raise NotImplementedError


class NormRecipe(Recipe):
    """``scale (x - mean) + at_mean``, row by row.

    Args:
        kernels (Eager): Who made the pass.
        x (Tensor): What it was of.
        keep (callable): :meth:`Region.pack`.
    """

    def __init__(
        self, kernels: Eager, x: Tensor, keep: Callable[[Tensor], 'Kept']
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.x = keep(x.detach())
        self.moments: Optional[Moments] = None
        self.coef: Any = None  # scale and at_mean

    def room_for(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Where a fused pass writes its coefficients to."""
        self.coef = x.new_empty(2, *x.shape[:2], dtype=dtype)
        return self.coef

    def note(self, x: Tensor, saved: Tensor) -> None:
        """Take the moments from what a fused pass has saved."""
        n, c = x.shape[:2]
        mean, var = saved[: 2 * n * c].view(2, n, c).unbind()
        self.moments = Moments(mean, var)

    def compute(self, relu: bool = False, other: Optional[Tensor] = None) -> Tensor:
        assert self.moments is not None
        return self.kernels.apply(self.x.tensor(), self.moments, self.coef, relu, other)


class WeightRecipe(Recipe):
    """A standardized weight.

    Args:
        standardize (callable): Makes it of the weight.
        weight (Tensor): The weight.
        keep (callable): :meth:`Region.pack`.
    """

    def __init__(
        self,
        standardize: Callable[[Tensor], Tensor],
        weight: Tensor,
        keep: Callable[[Tensor], 'Kept'],
    ) -> None:
        super().__init__()
        self.standardize = standardize
        self.weight = keep(weight.detach())

    def compute(self) -> Tensor:
        return self.standardize(self.weight.tensor())


class ActivationRecipe(Recipe):
    """An activation of what another recipe makes."""

    def __init__(self, source: Recipe, function: 'Activation') -> None:
        super().__init__(source.depth)
        self.source = source
        self.function = function

    def compute(self) -> Tensor:
        if self.function.is_relu and isinstance(self.source, (NormRecipe, SumRecipe)):
            return self.source.compute(relu=True)
        return self.function.within(self.source.compute())


class SumRecipe(Recipe):
    """The sum of what a recipe makes and of what another makes, or is kept.

    Args:
        first (Recipe): Makes the one.
        second (Recipe or Kept): Makes or is the other.
        part (callable): :meth:`Region.part`.
    """

    def __init__(
        self,
        first: Recipe,
        second: 'Union[Recipe, Kept]',
        part: Callable[[Recipe], Tensor],
    ) -> None:
        depths = [p.depth for p in (first, second) if isinstance(p, Recipe)]
        super().__init__(1 + max(depths))
        if isinstance(second, NormRecipe) and not isinstance(first, NormRecipe):
            first, second = second, first  # whose pass takes the other
        self.first = first
        self.second = second
        self.part = part

    def compute(self, relu: bool = False) -> Tensor:
        second = self.second
        other = self.part(second) if isinstance(second, Recipe) else second.tensor()
        if isinstance(self.first, NormRecipe):
            return self.first.compute(relu, other)
        result = self.first.compute().add_(other)
        return result.relu_() if relu else result


# -- sums and activations -------------------------------------------------------------


class Activation(NamedTuple):
    """An elementwise function of one tensor."""

    #: Maps a tensor to the result, in its memory where it can.
    within: Callable[[Tensor], Tensor]
    is_relu: bool = False
    #: Whether autograd keeps a copy of the argument where that is overwritten.
    keeps_copy: bool = False


def _relu(inplace: bool = False) -> Activation:
    return Activation(torch.relu_, is_relu=True)


def _relu6(inplace: bool = False) -> Activation:
    return Activation(partial(F.relu6, inplace=True))


def _hardtanh(
    min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Activation:
    return Activation(
        partial(F.hardtanh, min_val=min_val, max_val=max_val, inplace=True)
    )


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation(
        partial(F.leaky_relu, negative_slope=negative_slope, inplace=True)
    )


def _silu(inplace: bool = False) -> Activation:
    return Activation(partial(F.silu, inplace=True), keeps_copy=True)


def _hardswish(inplace: bool = False) -> Activation:
    return Activation(partial(F.hardswish, inplace=True), keeps_copy=True)


def _gelu(approximate: str = 'none') -> Activation:
    return Activation(partial(F.gelu, approximate=approximate))


#: By function: what its arguments behind the tensor make of it.
ACTIVATIONS: Dict[Callable, Callable[..., Activation]] = {
    **dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu
    ),
    F.relu6: _relu6,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    F.silu: _silu,
    F.hardswish: _hardswish,
    F.gelu: _gelu,
}


#: Of two tensors, without a factor.
ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
}
