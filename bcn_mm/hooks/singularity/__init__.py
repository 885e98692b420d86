"""How far the channels that feed ReLUs are from being eliminated.

The hook itself, apart from it what it takes of each call of a norm
(``measure``), what it makes of a window's calls (``statistics``), and the
picture of a run (``plot``).
"""

from .hook import EliminationSingularityHook
from .plot import draw_history
from .statistics import PREFIX, History

__all__ = ['PREFIX', 'EliminationSingularityHook', 'History', 'draw_history']
