"""Modules over :mod:`bcn_mm.ops`, in mmengine's root ``MODELS`` registry."""

from .bcn import BCN
from .ws_conv import WSConv1d, WSConv2d, WSConv3d

__all__ = ['BCN', 'WSConv1d', 'WSConv2d', 'WSConv3d']
