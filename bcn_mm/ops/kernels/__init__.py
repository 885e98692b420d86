"""The passes over tensors of full size, behind one door.

:func:`kernels_for` chooses who makes them; README.md beside this is the
contract. ``BCN_MM_KERNELS`` in the environment, or :func:`using`, chooses
otherwise: ``eager`` for ordinary operators on every device, ``native`` for the
CPU's own, ``triton`` for CUDA, ``auto`` for the best that serves.
"""

import os
import warnings
from contextlib import contextmanager
from typing import Iterator, Set

from torch import Tensor

from .._compat import is_compiling, is_transforming
from .cpp import Cpp
from .eager import Eager, Empty, Functional
from .native import Native
from .triton import Triton

#: What may be chosen, best first; ``auto`` takes the first that serves.
BACKENDS = {'cpp': Cpp(), 'native': Native(), 'triton': Triton(), 'eager': Eager()}
CHOICES = ('auto', *BACKENDS)
_BEST_FIRST = tuple(BACKENDS.values())
_EMPTY, _FUNCTIONAL = Empty(), Functional()
_said: Set[str] = set()  # what has been warned of


def _checked(choice: str) -> str:
    if choice not in CHOICES:
        raise ValueError(
            f'BCN_MM_KERNELS must be one of {", ".join(CHOICES)}, but is {choice!r}'
        )
    return choice


_choice = _checked(os.environ.get('BCN_MM_KERNELS', 'auto'))


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Have all passes made by one backend, as ``BCN_MM_KERNELS`` does.

    Args:
        choice (str): One of :data:`CHOICES`.

    Raises:
        ValueError: if there is no such backend.

    Example:
        >>> with using('eager'):
        ...     kernels_for(torch.zeros(1, 2))
        Eager()
    """
    global _choice
    before, _choice = _choice, _checked(choice)
    try:
        yield
    finally:
        _choice = before


def is_empty(x: Tensor) -> bool:
    """Whether there is nothing to normalize."""
    return x.numel() == 0


def kernels_for(x: Tensor) -> Eager:
    """Who makes the passes over ``x``.

    Raises:
        RuntimeError: if a backend was chosen that cannot serve ``x``.
    """
    if is_empty(x):
        return _EMPTY
    if is_compiling() or is_transforming():
        return _FUNCTIONAL
    if _choice == 'auto':
        return _best(x)
    backend = BACKENDS[_choice]
    objection = backend.objection(x)
    if objection or not backend.serves(x):
        raise RuntimeError(
            f'BCN_MM_KERNELS={_choice} does not serve {x.dtype} on {x.device}'
            + (f': {objection}' if objection else '')
        )
    return backend


def _best(x: Tensor) -> Eager:
    for backend in _BEST_FIRST:
        objection = backend.objection(x)
        if not objection and backend.serves(x):
            return backend
        if objection and objection not in _said:
            _said.add(objection)
            warnings.warn(
                f'the plain path of BCN is taken instead of {backend!r}: {objection}',
                stacklevel=4,
            )
    raise AssertionError('the plain path serves everything')
