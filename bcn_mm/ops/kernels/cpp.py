"""The CPU's own kernels, compiled from csrc/: a whole pass in one call.

``setup.py`` compiles them where it finds torch and a compiler, into a library
that is named after that torch. Nothing needs it: without one, or with that of
another torch, the other backends go on.
"""

import functools
import logging
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..estimates import Rule, Running, counted
from ..layout import dense, in_layout_of
from ..stages import Affine, InputGradient, Moments, Spec
from .eager import Coefficients, Eager

_FOLDER = Path(__file__).parent
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def library_name(torch_version: str) -> str:
    """The file that is compiled for a version of torch.

    Example:
        >>> library_name('2.13.0+cpu')
        '_cpu-torch-2.13.0+cpu.so'
    """
    return f'_cpu-torch-{torch_version}.so'


@functools.lru_cache(maxsize=None)
def operators() -> Optional[Any]:
    """The compiled operators, loaded once, or None; says in one line why not."""
    path = _FOLDER / library_name(torch.__version__)
    logger = logging.getLogger('bcn_mm')
    again = 'compile it with `pip install --no-build-isolation -e .`'
    if not path.is_file():
        others = sorted(p.name for p in _FOLDER.glob(library_name('*')))
        if others:
            logger.warning(
                'the kernels for the CPU were compiled for another torch (%s, and '
                'this is %s), so BCN runs without them; %s',
                ', '.join(others),
                torch.__version__,
                again,
            )
        return None
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        logger.warning(
            'the kernels for the CPU cannot be loaded, so BCN runs without them '
            '(%s); %s',
            ' '.join(str(error).split()),
            again,
        )
        return None
    return torch.ops.bcn_mm_cpu


class Cpp(Eager):
    """Compiled for the CPU; see csrc/."""

    fused = on_cpu = True

    def serves(self, x: Tensor) -> bool:
        return x.is_cpu and x.dtype in _DTYPES and operators() is not None

    def forward(
        self,
        x: Tensor,
        running: Running,
        rule: Rule,
        affine: Affine,
        spec: Spec,
        batch: Optional[Tensor] = None,
        repeats: bool = False,
        coef: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        training, estimate, momentum, start, _ = rule
        if training and (momentum is None or start != 'identity'):
            counted(running.num_batches_tracked, momentum, start)
        y, saved = _operators().forward(
            x,
            *running,
            *affine,
            *spec,
            training,
            estimate,
            momentum,
            start,
            batch,
            repeats,
            coef,
        )
        return y, (saved,)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Sequence[Tensor],
        affine: Affine,
        rule: Rule,
        spec: Spec,
        needs_dx: bool,
    ) -> Tuple[Optional[Tensor], Affine]:
        batch_statistics = rule.training and not rule.estimate
        dx, *grads = _operators().backward(
            dy, x, *saved, *affine, *spec, batch_statistics, needs_dx
        )
        return dx, Affine(*grads)

    # -- weight standardization ----------------------------------------------

    def standardize(
        self, weight: Tensor, eps: float, unbiased: bool, under_root: bool
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        work = dense(weight)  # filter after filter
        result, saved = _operators().standardize(work, eps, unbiased, under_root)
        if work is not weight:
            result = torch.empty_like(weight).copy_(result)
        return result, (saved,)

    def standardize_backward(
        self,
        grad: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        unbiased: bool,
        under_root: bool,
    ) -> Tensor:
        weight = dense(weight)
        grad = in_layout_of(grad, weight)
        return _operators().standardize_backward(grad, weight, *saved)

    # -- the passes by themselves --------------------------------------------

    def moments(self, x: Tensor) -> Moments:
        mean, var = _operators().moments(x)
        return Moments(mean, var, False)

    def apply(
        self,
        x: Tensor,
        moments: Moments,
        coef: Coefficients,
        relu: bool = False,
        other: Optional[Tensor] = None,
    ) -> Tensor:
        rows = (t.contiguous() for t in (moments.mean, *coef))
        if other is not None:
            other = in_layout_of(other, x)
        return _operators().apply(x, *rows, relu, other)

    def _reduce(self, dy: Tensor, x: Tensor, mean: Tensor) -> Tuple[Tensor, Tensor]:
        return _operators().reduce(dy, x, mean.contiguous())

    def _apply_add(
        self, dy: Tensor, x: Tensor, moments: Moments, g: InputGradient
    ) -> Tensor:
        rows = (g.dy_mean, moments.mean, g.dy_scale, g.x_scale, g.at_mean)
        return _operators().apply_add(dy, x, *(t.contiguous() for t in rows))


def _operators() -> Any:
    found = operators()
    assert found is not None  # serves() has said so
    return found
