"""Batch-Channel Normalization and Weight Standardization for OpenMMLab.

Importing it registers the layers in mmengine's root registry, where every
scope finds them: ``custom_imports = dict(imports=['bcn_mm'])``.
"""

from ._compat import extend_fusion
from .engine.cli import allow_mmengine_checkpoints, offer_configs
from .hooks import EliminationSingularityHook, SyncEstimatesHook
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
from .recipes import get_config, get_model, list_models
from .version import __version__
from .weights.authors import extend_mmengine

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
