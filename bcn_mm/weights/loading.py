"""What a model needs to see of a whole state dict before it loads it."""

import re
from collections import OrderedDict
from typing import Dict

from torch import nn

from ..errors import DialectError
from ..layers import BCN
from ..layers.ws_conv import METADATA
from .norm_layouts import State


def prepare_state_dict(model: nn.Module, state: State) -> State:
    """Fit a state dict to the model that will load it.

    Norms called ``gn1``, as in mmdet's GroupNorm models, are renamed to the
    ``bn1`` of a BCN in their place.

    Args:
        model (nn.Module): That will load it.
        state (dict): Is left as it is.

    Returns:
        dict: ``state``, or a renamed copy.

    Raises:
        DialectError: as :func:`check_dialects`.
    """
    check_dialects(model, state)
    renamed = {}
    for name, module in model.named_modules():
        if isinstance(module, BCN):
            alias = re.sub(r'(^|\.)bn(\d*)$', r'\1gn\2', name)
            if alias != name and f'{name}.weight' not in state:
                for entry in ('weight', 'bias'):
                    if f'{alias}.{entry}' in state:
                        renamed[f'{alias}.{entry}'] = f'{name}.{entry}'
    if not renamed:
        return state
    result = OrderedDict((renamed.get(k, k), v) for k, v in state.items())
    result._metadata = _metadata_of(state)
    return result


def part_of_state(state: State, prefix: str) -> State:
    """What a state dict has below a prefix, ``backbone.`` for instance.

    Its metadata included, by which it knows its dialect.
    """
    part, metadata = (
        OrderedDict(
            (k[len(prefix) :], v) for k, v in given.items() if k.startswith(prefix)
        )
        for given in (state, _metadata_of(state))
    )
    part._metadata = metadata
    return part


def dialects_of(state: State) -> Dict[str, str]:
    """The dialect of each convolution that was trained with one, if it is said."""
    found = {k: (v or {}).get(METADATA) for k, v in _metadata_of(state).items()}
    return {name: dialect for name, dialect in found.items() if dialect}


def check_dialects(model: nn.Module, state: State) -> None:
    """Make sure that a model standardizes weights as they were trained.

    Raises:
        DialectError: if the state was trained with weight standardization in
            a dialect that the model's convolutions do not have; names the
            first.
    """
    trained = dialects_of(state)
    for name, module in model.named_modules():
        if name not in trained or not isinstance(module, nn.modules.conv._ConvNd):
            continue
        # mmcv's ConvWS has no attribute that says so
        kind = type(module).__name__
        own = 'std' if kind == 'ConvWS2d' else None
        own = getattr(module, 'dialect', own)
        has = repr(own) if own else 'none'
        if trained[name] != own:
            raise DialectError(
                f'{name}: the checkpoint was trained with weight '
                f'standardization dialect={trained[name]!r}, this layer is a '
                f'{kind} with {has}; set conv_cfg=dict('
                f"type='WSConv2d', dialect={trained[name]!r})"
            )


def _metadata_of(state: State) -> dict:
    """By the names that loading gives what was saved in ``nn.DataParallel``."""
    metadata = getattr(state, '_metadata', None) or {}
    if all(name.split('.')[0] in ('', 'module') for name in metadata):
        return {name.partition('.')[2]: value for name, value in metadata.items()}
    return metadata
