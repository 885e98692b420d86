"""Weight Standardization in its three dialects."""

from typing import Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import affine

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


def _inverse(
    var: Tensor, fan: int, eps: float, dialect: str
) -> Tuple[Tensor, Tensor]:
    """The factor ``f(var)`` of a dialect, and its derivative."""
    unbiased, under_root = DIALECTS[dialect]
    bessel = fan / (fan - 1) if unbiased else 1.0
    var = var * bessel
    if under_root:
        inv = torch.rsqrt(var + eps)
        return inv, -0.5 * bessel * inv**3
    std = var.sqrt()
    inv = 1 / (std + eps)
    # a constant filter is centred to zero: its variance has no gradient
    slope = torch.where(std > 0, -0.5 * bessel * inv**2 / std, 0.0)
    return inv, slope


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, eps: float, dialect: str) -> Tensor:
        weight = weight.contiguous()
        filters = weight.view(1, weight.shape[0], -1)
        mean, var = affine.moments(filters)
        inv, _ = _inverse(var, filters.shape[2], eps, dialect)
        ctx.save_for_backward(weight, mean, var)
        ctx.eps, ctx.dialect = eps, dialect
        out = affine.apply(filters, inv, -mean * inv)
        return torch.ops.aten._unsafe_view(out, weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        weight, mean, var = ctx.saved_tensors
        filters = weight.view(1, weight.shape[0], -1)
        grad = grad.contiguous().view(filters.shape)
        fan = filters.shape[2]
        inv, slope = _inverse(var, fan, ctx.eps, ctx.dialect)
        total, centred = affine.reduce(grad, filters, mean)
        scale = 2 / fan * slope * centred
        out = affine.apply_add(
            grad, filters, inv, scale, -scale * mean - inv * total / fan
        )
        return out.view(weight.shape), None, None


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
        weight (Tensor): (out, in/groups, *kernel), floating.
        eps (float): Added to the divisor as shown. Default: 1e-5.
        dialect (str): One of the above. Default: ``'std'``.

    Returns:
        Tensor: of the shape and dtype of ``weight``, differentiable once.

    Raises:
        ValueError: if ``dialect`` is unknown, or if a filter has one weight
            only: it would always be standardized to zero.

    Example:
        >>> w = standardize_weight(torch.randn(8, 3, 3, 3))
        >>> w.mean(dim=(1, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    check_dialect(dialect)
    if weight.numel() and weight[0].numel() < 2:
        raise ValueError(
            f'weight standardization needs two or more weights per filter, '
            f'but got a weight of shape {tuple(weight.shape)}'
        )
    return _StandardizeWeight.apply(weight, eps, dialect)
