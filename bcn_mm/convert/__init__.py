"""Turning a stock config into a BCN config.

The way of a config through :func:`to_bcn`: the components that its model
names (``components.py``) with their checkpoints (``pretrained.py``), what only
the built model shows (``model.py``), what stands beside the model
(``training.py``), and the rates that go with the batch size (``rates.py``).
Configs are read and written in ``files.py``, those of mmengine's new style with
``new_style.py``; ``types.py`` knows what any of them calls a type.
"""

from .context import Change
from .conversion import to_bcn
from .files import check_target, difference, read_config, write_config
from .model import build_model, describe, in_scope, leftovers
from .tree import PARTS, children, part_of, walk
from .types import scope_of, type_name

__all__ = [
    'PARTS',
    'Change',
    'build_model',
    'check_target',
    'children',
    'describe',
    'difference',
    'in_scope',
    'leftovers',
    'part_of',
    'read_config',
    'scope_of',
    'to_bcn',
    'type_name',
    'walk',
    'write_config',
]
