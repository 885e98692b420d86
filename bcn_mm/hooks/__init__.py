"""Hooks of mmengine's runner, in its root ``HOOKS`` registry."""

from .recompute_activations import RecomputeActivationsHook
from .singularity import EliminationSingularityHook
from .sync_estimates import SyncEstimatesHook

__all__ = [
    'EliminationSingularityHook',
    'RecomputeActivationsHook',
    'SyncEstimatesHook',
]
