"""Batch-Channel Normalization and Weight Standardization for OpenMMLab.

Importing it registers the layers in mmengine's root registry, where every
scope finds them: ``custom_imports = dict(imports=['bcn_mm'])``. Where only
torch is installed, :mod:`bcn_mm.ops` can be used.
"""

from importlib.util import find_spec
from typing import Any

from .version import __version__

__all__ = [
    'BCN',
    'EliminationSingularityHook',
    'RecomputeActivationsHook',
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
    'recompute_activations',
    'replace_norms',
    'revert_sync_bcn',
    'to_bcn',
]


def _is_missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except (ImportError, ValueError):
        return True


if _is_missing('torch'):
    raise ImportError(
        'bcn_mm needs torch, which is not installed; pip install torch does, '
        'and https://pytorch.org/get-started has the command for your GPU'
    )

if _is_missing('mmengine'):

    def __getattr__(name: str) -> None:
        """Say what the public names need, when they are asked for."""
        if name not in __all__:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        missing = [p for p in ('mmengine', 'mmcv') if _is_missing(p)]
        raise ImportError(
            f'bcn_mm.{name} needs {" and ".join(missing)}, which '
            f'{"are" if len(missing) > 1 else "is"} not installed; '
            f"pip install --no-build-isolation 'bcn-mm[mm]' adds OpenMMLab's "
            f'packages, with an mmcv for your torch, and so does '
            f'tools/setup_env.sh of the repository; bcn_mm.ops works without'
        )

else:
    from . import _compat
    from .hooks import (
        EliminationSingularityHook,
        RecomputeActivationsHook,
        SyncEstimatesHook,
    )
    from .layers import (
        BCN,
        SyncBCN,
        WithBCN,
        WSConv1d,
        WSConv2d,
        WSConv3d,
        average_estimates,
        convert_sync_bcn,
        recompute_activations,
        replace_norms,
        revert_sync_bcn,
    )
    from .recipes import get_config, get_model, list_models

    _compat.apply()

    def __getattr__(name: str) -> Any:
        """Import the converter, which training does not need, when it is asked for."""
        if name == 'to_bcn':
            from .convert import to_bcn

            return to_bcn
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
