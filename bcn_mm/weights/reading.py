"""Checkpoints from strangers: reading them safely, and whether they fit."""

import os
import pickle
import re
from typing import Optional, Union

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from ..errors import DialectError, InputError
from .loading import check_dialects, part_of_state
from .norm_layouts import State
from .unpickling import load_weights


def read_checkpoint(path: str) -> dict:
    """Read a local checkpoint on the CPU, weights only.

    Returns:
        dict: the checkpoint; its ``state_dict`` is always present.

    Raises:
        InputError: if the file is missing, truncated, holds anything but
            data, holds no state dict, or one with numbers that are not finite.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise InputError(f'checkpoint {path} is a folder: name a file in it')
    if not os.path.isfile(path):
        raise InputError(f'checkpoint {path} does not exist')
    try:
        checkpoint = load_weights(path)
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL ([\w.]+)|attribute .*', str(e))
        what = f' ({found.group(0)})' if found else ''
        raise InputError(
            f'checkpoint {path} is damaged or holds more than weights{what} '
            f'and was not loaded'
        ) from e
    except Exception as e:  # a damaged pickle may raise almost anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(
            f'checkpoint {path} is truncated or no checkpoint: {reason}'
        ) from e
    if not isinstance(checkpoint, dict):
        raise InputError(
            f'checkpoint {path} holds no state dict but a {type(checkpoint).__name__}'
        )
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    state = checkpoint['state_dict']
    if not isinstance(state, dict):
        raise InputError(
            f'checkpoint {path}: its state_dict is a {type(state).__name__}'
        )
    for name, value in state.items():
        try:
            if not isinstance(name, str):
                raise ValueError(f'{name!r} is no name of a tensor')
            check_finite(name, value)
        except ValueError as e:
            raise InputError(f'checkpoint {path}: {e}') from e
    return checkpoint


def check_match(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Make sure that a checkpoint is one of exactly this model.

    mmengine loads what fits and goes on with the rest as initialized, which
    makes test metrics of a wrong pair of files look like a bad model.

    Args:
        model (nn.Module): Built, not loaded.
        checkpoint (dict): As :func:`read_checkpoint` returns it.
        path (str): Its file, for the message.

    Raises:
        InputError: says how much matched, and the first tensor that did not.
        DialectError: as :func:`.loading.check_dialects`.
    """

    def shapes(state: State) -> dict:
        return {
            re.sub(r'^module\.', '', k): (
                tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            )
            for k, v in state.items()
            if 'num_batches_tracked' not in k
        }

    own, given = shapes(model.state_dict()), shapes(checkpoint['state_dict'])
    matched = sum(given.get(k) == shape for k, shape in own.items())
    if matched == len(own) == len(given):
        check_dialects(unwrapped(model), checkpoint['state_dict'])
        return
    name = next(k for k in (*own, *given) if own.get(k) != given.get(k))
    raise InputError(
        f'checkpoint {path} is of another architecture: {matched} of the '
        f"model's {len(own)} tensors match, out of {len(given)} in the file; "
        f'the first that does not is {name} (model: '
        f'{own.get(name, "absent")}, file: {given.get(name, "absent")})'
    )


def check_starts(model: nn.Module) -> None:
    """Make sure that a model standardizes the weights that its parts start from.

    Those of local files that ``init_cfg`` names, which mmengine loads later.

    Args:
        model (nn.Module): Built, not initialized.

    Raises:
        DialectError: as :func:`.loading.check_dialects`; names the part.
    """
    for name, module in unwrapped(model).named_modules():
        given = getattr(module, 'init_cfg', None)
        for entry in given if isinstance(given, list) else [given]:
            path = entry.get('checkpoint') if isinstance(entry, dict) else None
            if not isinstance(path, str) or not os.path.isfile(path):
                continue
            state, prefix = read_checkpoint(path)['state_dict'], entry.get('prefix')
            if prefix:
                state = part_of_state(state, f'{prefix.rstrip(".")}.')
            try:
                check_dialects(module, state)
            except DialectError as e:
                raise DialectError(f'{name}.{e}' if name else str(e)) from e


def unwrapped(model: nn.Module) -> nn.Module:
    """A model, without what distributes it."""
    return model.module if is_model_wrapper(model) else model


def check_resumable(checkpoint: dict, path: str) -> None:
    """Make sure that a training can go on from a checkpoint.

    Args:
        checkpoint (dict): As :func:`read_checkpoint` returns it.
        path (str): Its file, for the message.

    Raises:
        InputError: if it has weights only, says how to start from them.
    """
    meta = checkpoint.get('meta')
    if (
        isinstance(meta, dict)
        and {'epoch', 'iter'} <= set(meta)
        and isinstance(checkpoint.get('message_hub'), dict)
    ):
        return
    raise InputError(
        f'checkpoint {path} does not say where its training was, and cannot be '
        f'resumed; start from its weights (--cfg-options load_from={path})'
    )


def check_optimizer(
    optimizer: Union[OptimWrapper, OptimWrapperDict], checkpoint: dict, path: str
) -> None:
    """Make sure that the state of an optimizer is one of exactly this one.

    Args:
        optimizer (OptimWrapper or OptimWrapperDict): Built, not loaded.
        checkpoint (dict): As :func:`read_checkpoint` returns it; without a
            state of an optimizer it goes.
        path (str): Its file, for the message.

    Raises:
        InputError: says what differs, and how to start from the weights.
    """
    if 'optimizer' not in checkpoint:
        return
    state = checkpoint['optimizer']
    if isinstance(optimizer, OptimWrapperDict):
        names = list(state) if isinstance(state, dict) else []
        problem = None
        if set(names) != set(optimizer.keys()):
            problem = f'the file has {names}, not {list(optimizer.keys())}'
        for name, wrapper in optimizer.items():
            problem = problem or _misfit(wrapper, state[name])
    else:
        problem = _misfit(optimizer, state)
    if problem:
        raise InputError(
            f'checkpoint {path} cannot be resumed with the optimizer of the config: '
            f'{problem}; start from its weights (--cfg-options load_from={path})'
        )


def _misfit(wrapper: OptimWrapper, state: object) -> Optional[str]:
    """What makes a state that of another optimizer, if anything does."""
    kind = type(wrapper.optimizer).__name__
    groups = state.get('param_groups') if isinstance(state, dict) else None
    if not isinstance(groups, list):
        return f'there is no state of one {kind}'
    own, given = (
        [len(group['params']) for group in all_groups]
        for all_groups in (wrapper.optimizer.param_groups, groups)
    )
    if len(own) != len(given):
        return f'{len(given)} param groups are in the file, not {len(own)}'
    for i, (n, m) in enumerate(zip(own, given)):
        if n != m:
            return f'param group {i} has {m} parameters in the file, not {n}'
    # beside the switches, of which every version of torch has more
    for name, value in wrapper.optimizer.defaults.items():
        switch = value is None or isinstance(value, bool)
        if not switch and any(name not in group for group in groups):
            return f'{kind} needs {name}, which is not in the file'
    return None


def check_finite(name: str, value: object) -> None:
    """Make sure that an entry of a state dict, if a tensor, is finite.

    Raises:
        ValueError: names the entry and says what it holds.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.isnan().any():
            raise ValueError(f'{name} holds NaN')
        if value.isinf().any():
            raise ValueError(f'{name} holds infinity')


def check_values(state: State) -> None:
    """Make sure that a state dict holds finite numbers under names.

    Raises:
        ValueError: names the first entry that does not.
    """
    if not state:
        raise ValueError('the state dict is empty')
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{name!r} is no name of a tensor')
        if not isinstance(value, Tensor):
            raise ValueError(f'{name} is no tensor but {type(value).__name__}')
        check_finite(name, value)
        if not value.is_floating_point() and not name.endswith('num_batches_tracked'):
            raise ValueError(f'{name} holds {value.dtype}, not real numbers')
        if name.endswith('running_var') and (value < 0).any():
            raise ValueError(f'{name} holds a negative variance')
