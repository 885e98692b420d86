"""Which pyramid level a call of a layer that levels share is for.

The level is known by order, and an order has a beginning: a *pass* begins
with the call of a module that no other module is calling, whatever that
module is, a whole detector or its head. torch tells of every such call
through its hooks for all modules, which are registered with the first layer
that counts levels.
"""

import sys
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Any, Dict, Iterator, List, Optional, Tuple

from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

from ..ops import exporting, recomputation
from ..ops._compat import ALWAYS_CALL, is_dynamo_compiling, module_call, untraced


class _Pass:
    """The pass that a thread is in."""

    def __init__(self) -> None:
        self.depth = 0  # how many calls of modules have begun and not ended
        # that the first of them runs in, unless it is compiled
        self.frame: Optional[FrameType] = None
        # of every layer, the spatial sizes of the inputs since a round of
        # levels began; None outside of any pass
        self.sizes: Optional[Dict[LevelCounter, List[int]]] = None

    def begin(self, frame: Optional[FrameType]) -> None:
        if self.depth == 0:
            self.frame, self.sizes = frame, {}
        self.depth += 1

    def end(self) -> None:
        if self.depth > 0:
            self.depth -= 1
            if self.depth == 0:
                self.frame = self.sizes = None

    def drop_if_over(self, now: FrameType) -> None:
        """Forget a pass that an error has ended without its hook.

        torch leaves out the hooks that are to be called after errors, too,
        while it compiles and exports. Nor does a pass go on if the call that
        runs ``now`` is an outermost one itself.
        """
        if self.frame is not now:
            try:
                self.frame.clear()
            except RuntimeError:  # it is running
                return
        self.depth, self.frame, self.sizes = 0, None, None


def _outermost_call(frame: FrameType) -> FrameType:
    """Of those in which modules are called, the last one above a frame.

    The frame itself if there is but its own module's.
    """
    calls = []
    above = frame
    while above is not None:
        if above.f_code is module_call.__code__:
            calls.append(above)
        above = above.f_back
    return calls[-1] if len(calls) > 1 else frame


def _caller(frame: Optional[FrameType]) -> Optional[FrameType]:
    """The frame, or that above it which is none of an old compiler's own."""
    while frame is not None and frame.f_globals['__name__'].startswith('torch._dynamo'):
        frame = frame.f_back
    return frame


class _Thread(threading.local):
    def __init__(self) -> None:
        self.current = _Pass()


_thread = _Thread()
_hooks: List[RemovableHandle] = []


# torch.compile traces these two with the modules that they are called for, and
# what it breaks off may go on in Python: both have to do the same
@untraced
def _begin_call(module: nn.Module, inputs: Tuple[Any, ...]) -> None:
    current, frame = _thread.current, None
    if not is_dynamo_compiling():
        frame = _caller(sys._getframe(1))
        if current.depth > 0:
            if current.frame is None:  # what began it is compiled
                current.frame = _outermost_call(frame)
            current.drop_if_over(frame)
    # a layer that is called from outside of any module begins nothing
    counter = getattr(module, '_levels', None)
    if current.depth > 0 or not isinstance(counter, LevelCounter):
        current.begin(frame)


@untraced
def _end_call(module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
    _thread.current.end()


def _register_hooks() -> None:
    if not _hooks:
        _hooks.extend(
            (
                _module.register_module_forward_pre_hook(_begin_call),
                _module.register_module_forward_hook(_end_call, **ALWAYS_CALL),
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
    current, frame = _thread.current, sys._getframe(2)  # of the caller
    if current.frame is not None:
        current.drop_if_over(frame)
    current.begin(frame)
    try:
        yield
    finally:
        current.end()


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
        _register_hooks()

    def __reduce__(self) -> Tuple[type, Tuple[int]]:  # copies and pickles begin anew
        return type(self), (self.num_levels,)

    @untraced
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
        sizes = _thread.current.sizes
        sizes = self._sizes if sizes is None else sizes.setdefault(self, [])
        if len(sizes) == self.num_levels or (sizes and size > sizes[-1]):
            sizes.clear()
        sizes.append(size)
        return len(sizes) - 1

    def reset(self) -> None:
        """Begin with the first level, outside of any pass."""
        self._sizes.clear()
