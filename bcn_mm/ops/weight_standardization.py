"""Weight Standardization in its three dialects."""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._compat import is_transforming
from .kernels import is_native
from .portable import exporting

_aten = torch.ops.aten

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
    """In ordinary operators, for every device."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, dialect: str) -> Tensor:
        unbiased, under_root = DIALECTS[dialect]
        axes, fan = tuple(range(1, weight.dim())), weight[0].numel()
        var, mean = torch.var_mean(weight, axes, correction=int(unbiased), keepdim=True)
        # the result is gain (w - mean), and slope / (fan - unbiased) is
        # -2 times the derivative of gain by the sum of (w - mean)^2
        if under_root:
            gain = (var + eps).rsqrt()
            slope = gain.pow(3)
        else:
            std = var.sqrt()
            gain = (std + eps).reciprocal()
            # a filter without variance has no direction to grow in
            slope = (gain.square() / std).masked_fill(std == 0, 0)
        ctx.save_for_backward(weight, mean, gain, slope / (fan - unbiased))
        return (weight - mean).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        weight, mean, gain, slope = ctx.saved_tensors
        axes = tuple(range(1, weight.dim()))
        centred = weight - mean
        along = (grad * centred).sum(axes, keepdim=True)
        grad = grad * gain - centred.mul_(slope * along)
        return grad - grad.mean(axes, keepdim=True), None, None


class _StandardizeOnCPU(torch.autograd.Function):
    """Filters as the channels of a group norm with one channel per group.

    The native backward takes a mean, a 1 / std and a gain per filter as they
    come, so one call serves all dialects.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, dialect: str) -> Tensor:
        given, weight = weight, weight.contiguous()
        out, fan = weight.shape[0], weight[0].numel()
        unbiased, under_root = DIALECTS[dialect]
        bessel = fan / (fan - 1) if unbiased else 1.0
        if under_root:  # bessel * var + eps = bessel * (var + eps / bessel)
            gain = weight.new_full((out,), bessel**-0.5)
            floor = eps / bessel
        else:  # keeps a constant filter finite; below any other's variance
            gain = None
            floor = 1e-36 if weight.dtype == torch.float64 else 1e-18
        result, mean, inv_std = _aten.native_group_norm(
            weight.view(1, out, fan), gain, None, 1, out, fan, out, floor
        )
        if gain is None:  # 1 / (sqrt(bessel) * std + eps) = gain / std
            gain = (inv_std[0] * eps).add_(bessel**0.5).reciprocal_()
            result.mul_(gain.view(out, 1))
        ctx.save_for_backward(weight, mean, inv_std, gain)
        ctx.root = None if under_root else bessel**0.5
        result = _aten._unsafe_view(result, weight.shape)
        if given is weight:
            return result
        return torch.empty_like(given).copy_(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        weight, mean, inv_std, gain = ctx.saved_tensors
        out, fan = weight.shape[0], weight[0].numel()
        if ctx.root:
            # the variance acts through std + eps, not through a root: the
            # same gradient as with this 1 / std and gain of equal product
            ratio = (gain * ctx.root).sqrt_()
            inv_std, gain = inv_std * ratio, gain / ratio
        grad = _aten.native_group_norm_backward(
            grad.contiguous().view(1, out, fan),
            weight.view(1, out, fan),
            mean,
            inv_std,
            gain,
            1,
            out,
            fan,
            out,
            [True, False, False],
        )[0]
        return grad.view(weight.shape), None, None


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
    if weight.numel() and weight[0].numel() < 2:
        raise ValueError(
            f'weight standardization needs two or more weights per filter, '
            f'but got a weight of shape {tuple(weight.shape)}'
        )
    # statistics of low precision weights in float32
    work = weight if weight.dtype == torch.float64 else weight.float()
    route = _StandardizeOnCPU if is_native(work) else _Standardize
    return route.apply(work, eps, dialect).to(weight.dtype)


def _plain(weight: Tensor, eps: float, dialect: str) -> Tensor:
    """In plain operators, for every other runtime."""
    unbiased, under_root = DIALECTS[dialect]
    work = weight if weight.dtype == torch.float64 else weight.float()
    flat = work.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    var = flat.var(1, correction=int(unbiased), keepdim=True)
    divisor = (var + eps).sqrt() if under_root else var.sqrt() + eps
    return (centred / divisor).view_as(weight).to(weight.dtype)
