"""How far the channels that feed ReLUs are from being eliminated."""

from .hook import PREFIX, EliminationSingularityHook, History, draw_history

__all__ = ['PREFIX', 'EliminationSingularityHook', 'History', 'draw_history']
