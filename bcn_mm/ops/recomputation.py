"""What a forward pass that is repeated takes from its first run.

Activation checkpointing runs a part of a forward pass a second time, inside
the backward pass. The second run must move no estimate, and must see the very
estimates of the first. So whatever a layer reads from its own state goes
through :func:`once`, and each call of ``torch.utils.checkpoint`` has a tape of
what that gave, which its recomputations, and nothing else, play back.
"""

import functools
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, TypeVar

import torch
from torch.utils import checkpoint as _checkpoint

from ._compat import is_compiling

_T = TypeVar('_T')

#: Whether a thread is within a checkpointed part of a pass. What
#: ``torch.compile`` has compiled is guarded by it.
active = False


class _Run(NamedTuple):
    """One run of a checkpointed function."""

    tape: List[Any]
    position: Optional[Iterator[Any]]  # in the tape; None while that is recorded


class _Stack(threading.local):
    def __init__(self) -> None:
        self.runs: List[_Run] = []


_stack = _Stack()
_lock = threading.Lock()
_depth = 0  # of all threads


def once(compute: Callable[[], _T]) -> _T:
    """What ``compute()`` returns; in a recomputation, what it returned then.

    Calls are told apart by their order within the checkpointed function.
    """
    if is_compiling() or not _stack.runs:
        return compute()
    recording = []
    for run in reversed(_stack.runs):
        if run.position is not None:
            try:
                value: _T = next(run.position)
            except StopIteration:
                raise RuntimeError(
                    'a checkpointed function ran layers when it was '
                    'recomputed that its first run did not'
                ) from None
            break
        recording.append(run.tape)
    else:
        value = compute()
    for tape in recording:
        tape.append(value)
    return value


def by_others() -> bool:
    """Whether this pass is repeated by something that has no tape."""
    return (
        not is_compiling()
        and torch._C._current_graph_task_id() != -1
        and all(run.position is None for run in _stack.runs)
    )


def is_on() -> bool:
    """Whether this pass is recorded, or repeats another."""
    return bool(_stack.runs) or torch._C._current_graph_task_id() != -1


def compiled() -> bool:
    """Whether what is being compiled will be recomputed by the compiler."""
    return torch.fx.traceback.current_meta.get('recompute') is not None


@contextmanager
def _running(tape: List[Any], again: bool) -> Iterator[None]:
    global active, _depth
    _stack.runs.append(_Run(tape, iter(tape) if again else None))
    with _lock:
        _depth += 1
        active = True
    try:
        yield
    finally:
        _stack.runs.pop()
        with _lock:
            _depth -= 1
            active = _depth > 0


def taped(
    function: Callable[..., _T], tape: Optional[List[Any]] = None
) -> Callable[..., _T]:
    """A function whose first run is recorded, and played back in all others.

    Args:
        function (callable): What is checkpointed.
        tape (list, optional): Of a first run that is recorded elsewhere.
            Default: None, where the first call is the first run.

    Returns:
        callable: does what ``function`` does.
    """
    first = tape is None
    record = [] if tape is None else tape

    def run(*args: Any, **kwargs: Any) -> _T:
        nonlocal first
        again, first = not first, False
        with _running(record, again):
            return function(*args, **kwargs)

    return run


def extend_checkpoint() -> None:
    """Give every call of ``torch.utils.checkpoint`` a tape, reentrant or not.

    Below the function that users call, so that whatever name they have
    imported it by, and the wrappers in torch and mmengine, come here.
    """
    reentrant = _checkpoint.CheckpointFunction
    if hasattr(reentrant.forward, '__wrapped__'):
        return
    forward = reentrant.forward
    name = '_checkpoint_without_reentrant_generator'
    generate = getattr(_checkpoint, name, None)

    @functools.wraps(forward)
    def tape_forward(ctx: Any, run_function: Callable, *args: Any) -> Any:
        return forward(ctx, taped(run_function), *args)

    # a patch of torch, which no type allows
    reentrant.forward = staticmethod(tape_forward)  # type: ignore[method-assign]
    if generate is None:  # torch 2.0
        name = '_checkpoint_without_reentrant'
        run = getattr(_checkpoint, name)

        @functools.wraps(run)
        def tape_run(function: Callable, *args: Any, **kwargs: Any) -> Any:
            return run(taped(function), *args, **kwargs)

        setattr(_checkpoint, name, tape_run)
        return

    @functools.wraps(generate)
    def tape_generator(fn: Callable, *args: Any, **kwargs: Any) -> Iterator[None]:
        tape: List[Any] = []
        with _running(tape, again=False):
            yield from generate(taped(fn, tape), *args, **kwargs)

    setattr(_checkpoint, name, tape_generator)
