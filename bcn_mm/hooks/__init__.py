"""Hooks of mmengine's runner, in its root ``HOOKS`` registry."""

from .estimates import SyncEstimatesHook
from .singularity import EliminationSingularityHook

__all__ = ['EliminationSingularityHook', 'SyncEstimatesHook']
