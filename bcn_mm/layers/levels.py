"""Which pyramid level a call of a layer that levels share is for.

The level is known by order, and an order has a beginning: a *pass* begins
with the call of a module that no other module is calling, whatever that
module is, a whole detector or its head. torch tells of every such call
through its hooks for all modules, which are registered with the first layer
that counts levels.
"""

import threading
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..ops import exporting, recomputation


class _Pass:
    """What has begun and is not over."""

    def __init__(self) -> None:
        self.root: Optional[object] = None  # whose call began it
        self.depth = 0  # of the root's calls of itself
        # of every layer, the spatial sizes of the inputs since a round of
        # levels began
        self.sizes: Optional[Dict[LevelCounter, List[int]]] = None

    def begin(self, root: object) -> None:
        if self.root is None:
            self.root, self.depth, self.sizes = root, 1, {}
        elif root is self.root:
            self.depth += 1

    def end(self, root: object) -> None:
        if root is self.root:
            self.depth -= 1
            if self.depth == 0:
                self.root = self.sizes = None


class _Thread(threading.local):
    """The pass that this thread is in."""

    def __init__(self) -> None:
        self.current = _Pass()


_thread = _Thread()
_compiled = _Pass()  # compilers follow no threads
_hooks = []


def _current() -> _Pass:
    if torch.compiler.is_dynamo_compiling():
        return _compiled
    return _thread.current


def _enter(module: nn.Module, inputs) -> None:
    current = _current()
    # a layer that is called from outside of any module begins nothing
    if current.root is not None or not hasattr(module, '_levels'):
        current.begin(module)


def _leave(module: nn.Module, inputs, output) -> None:
    _current().end(module)


def _listen() -> None:
    if not _hooks:
        _hooks.extend(
            (
                _module.register_module_forward_pre_hook(_enter),
                _module.register_module_forward_hook(
                    _leave, always_call=True
                ),
            )
        )


@contextmanager
def one_pass() -> Iterator[None]:
    """Make what is called within one pass through the levels.

    For code that calls a layer with one level after the other from outside of
    any module.

    Example:
        >>> layer = BCN(8, num_levels=2)
        >>> with one_pass():
        ...     outs = [layer(torch.randn(1, 8, s, s)) for s in (4, 2)]
    """
    current, root = _current(), object()
    current.begin(root)
    try:
        yield
    finally:
        current.end(root)


class LevelCounter:
    """Counts the calls of one layer in each pass.

    After ``num_levels`` calls, and when an input has more spatial positions
    than the one before it, another round of the levels begins, as in a pass
    that calls a head twice.

    Args:
        num_levels (int): How many levels there are, at least 2.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.last = 0  # the level of the last call
        self._sizes: List[int] = []  # of inputs outside of any pass
        _listen()

    def __reduce__(self):  # copies and pickles begin anew
        return type(self), (self.num_levels,)

    def next(self, x: Tensor) -> int:
        """The level that ``x``, the input of the layer's next call, is of."""
        if recomputation.by_others():
            raise RuntimeError(
                'a layer with num_levels is recomputed in the backward pass '
                'by something other than torch.utils.checkpoint, and cannot '
                'know its level: use torch.utils.checkpoint'
            )
        self.last = recomputation.once(lambda: self._count(x))
        return self.last

    def _count(self, x: Tensor) -> int:
        # what is recorded for other sizes goes by the number of calls alone
        size = 0 if exporting() else x.shape[2:].numel()
        sizes = _current().sizes
        sizes = (
            self._sizes if sizes is None else sizes.setdefault(self, [])
        )
        if len(sizes) == self.num_levels or (sizes and size > sizes[-1]):
            sizes.clear()
        sizes.append(size)
        return len(sizes) - 1

    def reset(self) -> None:
        """Begin with the first level, outside of any pass."""
        self._sizes.clear()
