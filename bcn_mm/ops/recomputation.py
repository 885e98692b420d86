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
from typing import Any, Callable, Iterator, List, NamedTuple, Optional

import torch
from torch.utils import checkpoint as _checkpoint

from ._compat import is_compiling

#: Whether a thread is within a checkpointed part of a pass. What
#: ``torch.compile`` has compiled is guarded by it.
active = False


class _Run(NamedTuple):
    """One run of a checkpointed function."""

    tape: list
    position: Optional[Iterator]  # in the tape; None while that is recorded


class _Stack(threading.local):
    def __init__(self) -> None:
        self.runs: List[_Run] = []


_stack = _Stack()
_lock = threading.Lock()
_depth = 0  # of all threads


def once(compute: Callable[[], Any]) -> Any:
    """What ``compute()`` returns; in a recomputation, what it returned then.

    Calls are told apart by their order within the checkpointed function.
    """
    if is_compiling() or not _stack.runs:
        return compute()
    recording = []
    for run in reversed(_stack.runs):
        if run.position is not None:
            value = next(run.position, _stack)
            if value is _stack:
                raise RuntimeError(
                    'a checkpointed function ran layers when it was '
                    'recomputed that its first run did not'
                )
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


def compiled() -> bool:
    """Whether what is being compiled will be recomputed by the compiler."""
    return torch.fx.traceback.current_meta.get('recompute') is not None


@contextmanager
def _running(tape: list, again: bool) -> Iterator[None]:
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


def taped(function: Callable, tape: Optional[list] = None) -> Callable:
    """A function whose first run is recorded, and played back in all others.

    Args:
        function (callable): What is checkpointed.
        tape (list, optional): Of a first run that is recorded elsewhere.
            Default: None, where the first call is the first run.

    Returns:
        callable: does what ``function`` does.
    """
    first = tape is None
    tape = [] if first else tape

    def run(*args, **kwargs):
        nonlocal first
        again, first = not first, False
        with _running(tape, again):
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
    generate = getattr(_checkpoint, '_checkpoint_without_reentrant_generator', None)

    @functools.wraps(forward)
    def tape_forward(ctx, run_function, *args):
        return forward(ctx, taped(run_function), *args)

    reentrant.forward = staticmethod(tape_forward)
    if generate is None:  # torch 2.0
        run = _checkpoint._checkpoint_without_reentrant
        _checkpoint._checkpoint_without_reentrant = functools.wraps(run)(
            lambda function, *args, **kwargs: run(taped(function), *args, **kwargs)
        )
        return

    @functools.wraps(generate)
    def tape_generator(fn, *args, **kwargs):
        tape = []
        with _running(tape, again=False):
            yield from generate(taped(fn, tape), *args, **kwargs)

    _checkpoint._checkpoint_without_reentrant_generator = tape_generator
