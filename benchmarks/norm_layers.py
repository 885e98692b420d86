"""The layers that norms.py compares."""

from contextlib import nullcontext
from typing import Callable, ContextManager, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from bcn_mm import BCN
from bcn_mm.errors import InputError
from bcn_mm.ops.kernels import BACKENDS, kernels_for, using

GROUPS = 32


class Formulation(nn.Module):
    """Micro-batch BCN as the paper states it, one torch operation a step.

    What one would write from algorithm 1 of arXiv:1903.10520v2; the baseline.
    """

    def __init__(self, channels: int, momentum: float = 0.01, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.batch_weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.batch_bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight = nn.Parameter(torch.ones(1, GROUPS, 1))
        self.bias = nn.Parameter(torch.zeros(1, GROUPS, 1))
        self.register_buffer('mean', torch.zeros(1, channels, 1, 1))
        self.register_buffer('var', torch.ones(1, channels, 1, 1))

    def forward(self, x):
        over = (0, 2, 3)
        with torch.no_grad():
            mean = x.mean(over, keepdim=True)
            var = (x - self.mean).square().mean(over, keepdim=True)
            self.mean += self.momentum * (mean - self.mean)
            self.var += self.momentum * (var - self.var)
            mean, std = self.mean.clone(), torch.sqrt(self.var + self.eps)
        z = (x - mean) / std * self.batch_weight + self.batch_bias
        z = z.reshape(x.shape[0], GROUPS, -1)
        centred = z - z.mean(2, keepdim=True)
        var = centred.square().mean(2, keepdim=True)
        y = centred / torch.sqrt(var + self.eps) * self.weight + self.bias
        return y.reshape(x.shape).to(x.dtype)


def _compiled(channels: int) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(Formulation(channels))


class Norm(NamedTuple):
    """A layer that is compared.

    Attributes:
        build (callable): Makes one for a number of channels.
        backend (str, optional): Who makes its passes, of
            ``bcn_mm.ops.kernels.BACKENDS``; None leaves that as it is.
        default (bool): Whether it is measured unless it is left out.
    """

    build: Callable[[int], nn.Module]
    backend: Optional[str] = None
    default: bool = True

    def passes(self) -> ContextManager[None]:
        """A context in which the backend makes them."""
        return nullcontext() if self.backend is None else using(self.backend)

    def serves(self, x: Tensor) -> bool:
        """Whether the layer can be given ``x``."""
        return self.backend is None or BACKENDS[self.backend].serves(x)

    def placed(self, x: Tensor) -> nn.Module:
        """One for ``x``, with parameters in float32, as under mixed precision."""
        layer = self.build(x.shape[1]).to(x.device)
        # whose parameters must be of the input's dtype there
        alike = x.is_cuda and isinstance(layer, nn.GroupNorm)
        return layer.to(x.dtype) if alike else layer


def _bcn(channels: int) -> nn.Module:
    return BCN(channels, GROUPS)


# the first is what the others are compared with
LAYERS = {
    'GN': Norm(lambda c: nn.GroupNorm(GROUPS, c)),
    'BN': Norm(nn.BatchNorm2d),
    'BCN': Norm(_bcn),
    'BCN large-batch': Norm(lambda c: BCN(c, GROUPS, estimate=False)),
    **{f'BCN {backend}': Norm(_bcn, backend) for backend in BACKENDS},
    'paper in torch ops': Norm(Formulation, default=False),
    'the same compiled': Norm(_compiled, default=False),
}
BASE = 'GN'


def choose(
    names: Optional[Sequence[str]], device: str, dtypes: Sequence[str]
) -> List[str]:
    """The layers to measure, in the order of :data:`LAYERS`.

    Args:
        names (list[str], optional): Those that were asked for; None for the
            usual ones, without backends that serve no input.
        device (str): Of the inputs.
        dtypes (list[str]): Of the inputs.

    Raises:
        InputError: if a backend was asked for that serves none of the inputs.
    """
    inputs = [torch.empty(1, 1, device=device, dtype=getattr(torch, d)) for d in dtypes]
    serving = [n for n, norm in LAYERS.items() if any(map(norm.serves, inputs))]
    if names is None:
        return [n for n in serving if LAYERS[n].default]
    names = {BASE, *names}
    for name in names.difference(serving):
        raise InputError(
            f'{name!r}: {LAYERS[name].backend} does not serve {" or ".join(dtypes)} '
            f'on {device} here; leave it out of --layers'
        )
    return [n for n in serving if n in names]


def backend_of(layer: nn.Module, x: Tensor) -> Optional[str]:
    """Who makes the passes of a layer over ``x``; None if it is not BCN."""
    if not isinstance(layer, BCN):
        return None
    kernels = kernels_for(x)
    return next(name for name, backend in BACKENDS.items() if backend is kernels)
