"""Checkpoints read as data, on every version of torch.

``torch.load(weights_only=True)`` makes nothing but what it knows or is told to
allow. It can be told so since torch 2.6; before, an unpickler of ours that makes
exactly the same takes the place of Python's.
"""

import codecs
import pickle
from collections import Counter
from functools import lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Callable, Dict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..ops._compat import TORCH

#: Whether torch can be told what to allow, under which name.
TELLS = TORCH >= (2, 6)

_STATISTICS = ('min', 'max', 'current', 'mean', 'statistics')


def _history_statistic(owner: object, name: str) -> Callable:
    """Stands in for ``getattr`` in checkpoints, where mmengine's
    ``HistoryBuffer`` pickles its own methods by name; anything else that a
    file asks it for is refused."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'a checkpoint may not read the attribute {name!r} of {owner!r}'
    )


def _mmengine_types() -> Dict[str, Any]:
    """What mmengine's checkpoints hold beside weights: log histories and
    numpy scalars, under the names that numpy 1 and 2 write."""
    core = 'numpy._core' if np.__version__.split('.')[0] >= '2' else 'numpy.core'
    multiarray = import_module(f'{core}.multiarray')
    kinds = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDU'}
    types = [HistoryBuffer, np.ndarray, np.dtype, *kinds]
    allowed = {f'{t.__module__}.{t.__qualname__}': t for t in types}
    allowed['builtins.getattr'] = _history_statistic
    for name in ('scalar', '_reconstruct'):
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            allowed[f'{module}.{name}'] = getattr(multiarray, name)
    return allowed


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's checkpoints.

    Before torch 2.6, whose default is to make whatever a file asks for, this
    does nothing.
    """
    if TELLS:
        torch.serialization.add_safe_globals(
            [(value, name) for name, value in _mmengine_types().items()]
        )


@lru_cache(maxsize=None)
def _allowed() -> Dict[str, Any]:
    from torch import _weights_only_unpickler as known

    dtypes = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    more = {f'builtins.{t.__name__}': t for t in (set, bytearray, complex)}
    more['collections.Counter'] = Counter  # the milestones of a scheduler
    more['_codecs.encode'] = codecs.encode  # bytes, in the pickles of Python 2
    return {**dtypes, **more, **known._get_allowed_globals(), **_mmengine_types()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = {'__builtin__': 'builtins'}.get(module, module)  # Python 2's name
        try:
            return _allowed()[f'{module}.{name}']
        except KeyError:
            raise pickle.UnpicklingError(
                f'a checkpoint may not make a GLOBAL {module}.{name}'
            ) from None


_weights_pickle = SimpleNamespace(
    __name__='weights_pickle',
    Unpickler=_Unpickler,
    load=lambda file, **kwargs: _Unpickler(file, **kwargs).load(),
)


def as_data(load: Callable) -> Callable:
    """``torch.load`` that makes nothing but data unless it is told otherwise.

    As torch's own is since 2.6: there, this is that.

    Args:
        load (callable): The ``torch.load`` of this version.
    """
    if TELLS:
        return load

    def load_data(f, map_location=None, pickle_module=None, **kwargs):
        if pickle_module is None and kwargs.get('weights_only') is not False:
            kwargs.pop('weights_only', None)
            pickle_module = _weights_pickle
        return load(f, map_location, pickle_module, **kwargs)

    load_data.__wrapped__ = load
    return load_data


def load_weights(path: str) -> Any:
    """What a local file holds, on the CPU.

    Raises:
        pickle.UnpicklingError: if that is more than data.
    """
    # again: torch's safe_globals(), where somebody used it, took them back
    allow_mmengine_checkpoints()
    options = dict(weights_only=True) if TELLS else {}
    return as_data(torch.load)(path, map_location='cpu', **options)
