"""Modules over :mod:`bcn_mm.ops`, in mmengine's root ``MODELS`` registry."""

from .bcn import BCN
from .recompute import RecomputedActivations, recompute_activations
from .replace import WithBCN, is_replaceable, replace_norms
from .sync import (
    SyncBCN,
    average_estimates,
    convert_sync_bcn,
    revert_sync_bcn,
)
from .ws_conv import WS_CONVS, WSConv1d, WSConv2d, WSConv3d

__all__ = [
    'BCN',
    'WS_CONVS',
    'RecomputedActivations',
    'SyncBCN',
    'WSConv1d',
    'WSConv2d',
    'WSConv3d',
    'WithBCN',
    'average_estimates',
    'convert_sync_bcn',
    'is_replaceable',
    'recompute_activations',
    'replace_norms',
    'revert_sync_bcn',
]
