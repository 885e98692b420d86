"""Batch-Channel Normalization and Weight Standardization for OpenMMLab.

Importing it registers the layers in mmengine's root registry, where every
scope finds them: ``custom_imports = dict(imports=['bcn_mm'])``.
"""

from .checkpoint import extend_mmengine
from .fusion import extend_fusion
from .hooks import EliminationSingularityHook, SyncEstimatesHook
from .hub import get_config, get_model, list_models
from .layers import (
    BCN,
    SyncBCN,
    WithBCN,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    average_estimates,
    convert_sync_bcn,
    replace_norms,
    revert_sync_bcn,
)
from .runtime import allow_mmengine_checkpoints, offer_configs
from .version import __version__

__all__ = [
    'BCN',
    'EliminationSingularityHook',
    'SyncBCN',
    'SyncEstimatesHook',
    'WSConv1d',
    'WSConv2d',
    'WSConv3d',
    'WithBCN',
    '__version__',
    'average_estimates',
    'convert_sync_bcn',
    'get_config',
    'get_model',
    'list_models',
    'replace_norms',
    'revert_sync_bcn',
]

allow_mmengine_checkpoints()
extend_mmengine()
extend_fusion()
offer_configs()
