"""Batch-Channel Normalization and Weight Standardization for OpenMMLab.

Importing it registers the layers in mmengine's root registry, where every
scope finds them: ``custom_imports = dict(imports=['bcn_mm'])``.
"""

from .layers import BCN, WSConv1d, WSConv2d, WSConv3d
from .runtime import allow_mmengine_checkpoints
from .version import __version__

__all__ = ['BCN', 'WSConv1d', 'WSConv2d', 'WSConv3d', '__version__']

allow_mmengine_checkpoints()
