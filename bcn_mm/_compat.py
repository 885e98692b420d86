"""BatchNorm fused into standardized convolutions, by mmcv and by torch.

They scale the weight of the convolution before a BatchNorm. A standardized
convolution would standardize the scaled weight again, or, in mmcv's fusion on
the fly, not at all. Importing ``bcn_mm`` calls :func:`extend_fusion`, so that
they are handed the plain convolution that it computes. (BCN is no BatchNorm to
them, and stays; its own folding is :func:`bcn_mm.export.fold`.)
"""

import sys
from functools import wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Callable

from torch import nn
from torch.nn.utils import fusion

from .export import _plain
from .layers import WSConv1d, WSConv2d, WSConv3d
from .layers.convert import take_hooks

_WS = (WSConv1d, WSConv2d, WSConv3d)


def extend_fusion() -> None:
    """Let mmcv and torch fuse standardized convolutions with BatchNorm.

    ``mmcv.cnn.fuse_conv_bn``, behind ``--fuse-conv-bn``; the
    ``efficient_conv_bn_eval`` of mmcv's ``ConvModule``; and
    ``torch.nn.utils.fuse_conv_bn_eval``. Other convolutions go the old way.
    """
    _replace(fusion, 'fuse_conv_bn_eval', _fuse_plain)
    try:
        # the name is that of a function too, which hides the module
        mmcv = import_module('mmcv.cnn.utils.fuse_conv_bn')
        bricks = import_module('mmcv.cnn.bricks.conv_module')
    except ImportError:
        return
    _replace(mmcv, '_fuse_conv_bn', _fuse_plain)
    if hasattr(bricks, 'efficient_conv_bn_eval_forward'):  # since 2.0.1
        _replace(bricks, 'efficient_conv_bn_eval_forward', _forward_plain)


def _replace(home, name: str, wrapper: Callable) -> None:
    """Wrap a function, once, wherever it was imported under its name."""
    stock = getattr(home, name)
    if hasattr(stock, '_bcn_mm'):
        return
    new = wraps(stock)(wrapper(stock))
    new._bcn_mm = True
    for module in list(sys.modules.values()):
        if getattr(module, '__dict__', {}).get(name) is stock:
            setattr(module, name, new)


def _fuse_plain(fuse: Callable) -> Callable:
    """A fusion of plain convolutions made one of standardized ones too."""

    def fuse_plain(conv, *args, **kwargs):
        if isinstance(conv, _WS):
            conv = _plain_of(conv)
        return fuse(conv, *args, **kwargs)

    return fuse_plain


def _plain_of(conv: nn.Module) -> nn.Module:
    """The plain convolution that a standardized one computes."""
    plain = _plain(conv, conv.standardized_weight(), conv.bias)
    plain.weight.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        plain.bias.requires_grad_(conv.bias.requires_grad)
    take_hooks(plain, conv)
    return plain.train(conv.training)


def _forward_plain(forward: Callable) -> Callable:
    """As :func:`_fuse_plain`, for a fusion in each pass, with gradients."""

    def forward_plain(bn, conv, x):
        if isinstance(conv, _WS):
            conv = SimpleNamespace(
                weight=conv.standardized_weight(),
                bias=conv.bias,
                _conv_forward=conv._conv_forward,
            )
        return forward(bn, conv, x)

    return forward_plain
