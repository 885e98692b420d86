"""What the steps of a conversion share."""

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from mmengine.config import ConfigDict
from mmengine.registry import Registry

from .tree import part_of

#: The type of a component that is built through :func:`bcn_mm.layers.WithBCN`.
WRAPPER = 'WithBCN'


class Change(NamedTuple):
    """One thing that a conversion did, or saw and left alone.

    Attributes:
        path (str): Of the setting, dotted.
        before (object): Its value; None if it was not set.
        after (object): Its new value; ``before`` if left alone.
        note (str): Why, where that is not obvious.
    """

    path: str
    before: Any
    after: Any
    note: str = ''


@dataclass
class Context:
    """The options of a conversion, and what it has done so far.

    Attributes:
        registry (Registry): Where the config's types are looked up.
        norm_cfg (ConfigDict): What replaces the norms.
        asked (dict): What of it was asked for, and goes for norms that are BCN too.
        ws (bool): Whether convolutions become weight-standardized.
        only (Sequence[str], optional): The parts to convert; None for all.
        pretrained (str, optional): A backbone's checkpoint, trained with BCN.
        loads (bool): Whether the config names weights of the model or its backbone
            elsewhere than in the component that they are for.
        changes (list[Change]): In the order in which they were made.
        norms (dict): path of a component -> the BCN dicts that it has.
        defaults (dict): path of a component -> its dict, and a copy from
            before norms that its constructor has by default were added.
        replaced (dict): part -> the classes of norms that were replaced; that
            of BCN where only the convolutions are others.
        standardized (set[str]): The parts whose plain convolutions became
            weight-standardized.
    """

    registry: Registry
    norm_cfg: ConfigDict
    asked: Dict[str, Any] = field(default_factory=dict)
    ws: bool = False
    only: Optional[Sequence[str]] = None
    pretrained: Optional[str] = None
    loads: bool = False
    changes: List[Change] = field(default_factory=list)
    norms: Dict[str, List[dict]] = field(default_factory=dict)
    defaults: Dict[str, Tuple[dict, dict]] = field(default_factory=dict)
    replaced: Dict[str, Set[type]] = field(default_factory=lambda: defaultdict(set))
    standardized: Set[str] = field(default_factory=set)

    def selects(self, path: str) -> bool:
        """Whether a setting is in one of the parts to convert."""
        return self.only is None or part_of(path) in self.only

    def change(
        self, node: dict, key: str, value: Any, path: str, note: str = ''
    ) -> None:
        """Set ``node[key]``, of the dict at ``path``, unless it is so."""
        before = node.get(key)
        if before != value:
            node[key] = value
            where = f'{path}.{key}' if path else key
            self.changes.append(Change(where, before, copy.deepcopy(value), note))

    def keep(self, path: str, value: Any, note: str) -> None:
        """Say why a setting is left alone."""
        self.changes.append(Change(path, value, value, note))

    def drop_defaults(self, path: str) -> None:
        """Take out of a component's dict what it has by default."""
        node, before = self.defaults.pop(path)
        node.clear()
        node.update(before)
        self.norms.pop(path, None)
        self.changes = [c for c in self.changes if c.path.rpartition('.')[0] != path]
