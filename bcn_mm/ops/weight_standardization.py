"""Weight Standardization in its three dialects."""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import recomputation, rematerialization
from ._compat import is_compiling, is_transforming
from .kernels import Eager, kernels_for
from .portable import exporting
from .recipes import WeightRecipe

#: The divisor of each dialect, over the K = in/groups * prod(kernel) weights
#: of one output channel, as ``dialect: (unbiased variance, eps under root)``.
DIALECTS = {
    'std': (True, False),
    'var': (True, True),
    'biased_var': (False, True),
}


def check_dialect(dialect: str) -> None:
    """Raise a ValueError that lists the choices if ``dialect`` is unknown."""
    if dialect not in DIALECTS:
        raise ValueError(
            f'unknown weight standardization dialect {dialect!r}; choose one '
            f'of {", ".join(map(repr, DIALECTS))}'
        )


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, eps: float, dialect: str, kernels: Eager
    ) -> Tensor:
        result, saved = kernels.standardize(weight, eps, *DIALECTS[dialect])
        ctx.save_for_backward(weight, *saved)
        ctx.settings = kernels, dialect
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None, None]:
        # entering no_grad takes as long as a small weight does, so only if it must
        if torch.is_grad_enabled():
            return once_differentiable(_backward)(ctx, grad)
        return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None, None]:
    weight, *saved = ctx.saved_tensors
    kernels, dialect = ctx.settings
    grad = kernels.standardize_backward(grad, weight, saved, *DIALECTS[dialect])
    return grad, None, None, None


def standardize_weight(
    weight: Tensor, eps: float = 1e-5, dialect: str = 'std'
) -> Tensor:
    r"""Standardize the filters of a convolution.

    Over the :math:`K = \text{in}/\text{groups} \cdot \prod \text{kernel}`
    weights of one output channel, with their mean, ``dialect`` divides by

    ================ ==================================== ====================
    ``dialect``      :math:`w - \bar w` divided by        written by
    ================ ==================================== ====================
    ``'std'``        ``std_unbiased + eps``               mmcv's ``ConvWS``;
                                                          the authors'
                                                          detection, DeepLab
    ``'var'``        ``sqrt(var_unbiased + eps)``         the authors'
                                                          ImageNet code
    ``'biased_var'`` ``sqrt(var_biased + eps)``           timm's
                                                          ``StdConv2d``, BiT
    ================ ==================================== ====================

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization", arXiv:1903.10520v2, eq. 2.

    Args:
        weight (Tensor): ``(out, in/groups, *kernel)``, floating.
        eps (float): Added to the divisor as shown. Default: 1e-5.
        dialect (str): One of the above. Default: ``'std'``.

    Returns:
        Tensor: of the shape, dtype and memory layout of ``weight``,
        differentiable once.

    Raises:
        ValueError: if ``dialect`` is unknown, or if a filter has one weight
            only: it would always be standardized to zero.

    Example:
        >>> w = standardize_weight(torch.randn(8, 3, 3, 3))
        >>> w.mean(dim=(1, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    check_dialect(dialect)
    if exporting() or is_transforming():
        return _plain(weight, eps, dialect)
    if weight.numel() and weight.shape[1:].numel() < 2:
        raise ValueError(
            f'weight standardization needs two or more weights per filter, '
            f'but got a weight of shape {tuple(weight.shape)}'
        )
    # statistics of low precision weights in float32
    work = weight if weight.dtype == torch.float64 else weight.float()
    kernels = kernels_for(work)
    result = _Standardize.apply(work, eps, dialect, kernels)
    if not is_compiling() and rematerialization.watching and work is weight:
        _follow(result, weight, eps, dialect, kernels)
    return result.to(weight.dtype)


def _follow(
    result: Tensor, weight: Tensor, eps: float, dialect: str, kernels: Eager
) -> None:
    region = rematerialization.current()
    if region is None or not torch.is_grad_enabled() or recomputation.is_on():
        return

    def standardize(weight: Tensor) -> Tensor:
        return kernels.standardize(weight, eps, *DIALECTS[dialect])[0]

    recipe = WeightRecipe(standardize, weight, region.pack)
    region.follow(result, recipe)


def _plain(weight: Tensor, eps: float, dialect: str) -> Tensor:
    """In plain operators, for every other runtime."""
    unbiased, under_root = DIALECTS[dialect]
    work = weight if weight.dtype == torch.float64 else weight.float()
    flat = work.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    var = flat.var(1, correction=int(unbiased), keepdim=True)
    # of a filter of equal weights the root has no derivative, but the result has
    some = var.clamp_min(torch.finfo(var.dtype).tiny)
    divisor = (var + eps).sqrt() if under_root else some.sqrt() + eps
    return (centred / divisor).view_as(weight).to(weight.dtype)
