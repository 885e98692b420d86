"""What a model needs to see of a whole state dict before it loads it."""

import re
from collections import OrderedDict

from torch import nn

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
        RuntimeError: if the state was trained with weight standardization in
            a dialect that the model's convolutions do not have; names the
            first.
    """
    metadata = getattr(state, '_metadata', None) or {}
    renamed = {}
    for name, module in model.named_modules():
        if isinstance(module, BCN):
            alias = re.sub(r'(^|\.)bn(\d*)$', r'\1gn\2', name)
            if alias != name and f'{name}.weight' not in state:
                for entry in ('weight', 'bias'):
                    if f'{alias}.{entry}' in state:
                        renamed[f'{alias}.{entry}'] = f'{name}.{entry}'
        elif isinstance(module, nn.modules.conv._ConvNd):
            trained = (metadata.get(name) or {}).get(METADATA)
            # mmcv's ConvWS has no attribute that says so
            kind = type(module).__name__
            own = 'std' if kind == 'ConvWS2d' else None
            own = getattr(module, 'dialect', own)
            has = repr(own) if own else 'none'
            if trained not in (None, own):
                raise RuntimeError(
                    f'{name}: the checkpoint was trained with weight '
                    f'standardization dialect={trained!r}, this layer is a '
                    f'{kind} with {has}; set conv_cfg=dict('
                    f"type='WSConv2d', dialect={trained!r})"
                )
    if not renamed:
        return state
    result = OrderedDict((renamed.get(k, k), v) for k, v in state.items())
    result._metadata = metadata
    return result
