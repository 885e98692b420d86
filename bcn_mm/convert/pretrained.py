"""Checkpoints that a config starts from, and stages that it freezes."""

from typing import Any, Dict, Set

from mmengine.config import Config, ConfigDict
from torch import nn

from ..errors import InputError
from ..layers import BCN, WS_CONVS
from ..weights.loading import check_dialects, dialects_of, part_of_state
from ..weights.norm_layouts import INNER, State, layout_of
from ..weights.reading import read_checkpoint
from .context import Context
from .model import build_model
from .tree import part_of
from .types import type_name

# Where a component names what it starts from.
_KEYS = ('init_cfg', 'pretrained')


def unfreeze(
    context: Context,
    node: dict,
    path: str,
    arguments: Dict[str, Any],
    replaced: Set[type],
    standardized: bool,
) -> None:
    """Let a component train whose norms or weights are others now.

    Stages that are frozen stay so where weights of BatchNorm stay, which BCN reads;
    others would be frozen as they were drawn.

    Args:
        context (Context): Receives what is changed.
        node (dict): The component's config.
        path (str): Its dotted name.
        arguments (dict): The defaults of its constructor.
        replaced (set[type]): The classes of its norms that were replaced.
        standardized (bool): Whether its plain convolutions were standardized.
    """
    if node.get('norm_eval', arguments.get('norm_eval')) is True:
        context.change(node, 'norm_eval', False, path)
    given = context.pretrained and part_of(path) == 'backbone'
    # what stands for none differs: -1 in most, 0 in EfficientNet
    none = arguments.get('frozen_stages', -1)
    frozen = node.get('frozen_stages', none)
    if frozen != none and not given:
        loaded = context.loads or any(_checkpoints(node.get(k)) for k in _KEYS)
        if loaded and not standardized and not _per_group(replaced):
            note = 'BatchNorm weights: as good frozen'
            context.keep(f'{path}.frozen_stages', frozen, note)
        else:
            note = 'no BCN weights to freeze'
            context.change(node, 'frozen_stages', none, path, note)
    if not given:
        for key in _KEYS:
            _review_checkpoint(context, node, key, path, replaced, standardized)


def convert_checkpoints(context: Context, cfg: Config, node: dict, path: str) -> None:
    """Settle what a model starts from, beside its components' own.

    Args:
        context (Context): Receives what is changed.
        cfg (Config): The whole config.
        node (dict): The part of its model that has the backbone.
        path (str): The dotted name of this.

    Raises:
        ValueError: if there are weights for a backbone, but none to take
            them, or they do not fit it.
    """
    if context.pretrained:
        _set_pretrained(context, node, path)
    else:
        _review_checkpoint(
            context,
            node,
            'pretrained',
            path,
            context.replaced['backbone'],
            'backbone' in context.standardized,
        )
    replaced = set().union(*context.replaced.values())
    standardized = bool(context.standardized)
    _review_checkpoint(context, cfg, 'load_from', '', replaced, standardized)


def _set_pretrained(context: Context, node: ConfigDict, path: str) -> None:
    """Initialize the backbone from a checkpoint that fits."""
    if 'backbone' not in node:
        raise ValueError('pretrained: the model has no backbone')
    checkpoint = context.pretrained
    init_cfg = ConfigDict(type='Pretrained', checkpoint=checkpoint)
    if '://' not in checkpoint:
        state = read_checkpoint(checkpoint)['state_dict']
        if any(key.startswith('backbone.') for key in state):
            init_cfg.prefix = 'backbone.'
            state = part_of_state(state, 'backbone.')
        _standardize_as(context, node.backbone, f'{path}.backbone', state)
        _check_fits(context, node.backbone, state)
    context.change(node.backbone, 'init_cfg', init_cfg, f'{path}.backbone')
    if node.get('pretrained'):
        context.change(node, 'pretrained', None, path)


def _standardize_as(context: Context, node: dict, path: str, state: State) -> None:
    """Give a backbone the dialect of the weights that it starts from.

    Raises:
        InputError: if they were trained with one, and it standardizes nothing.
    """
    trained = sorted(set(dialects_of(state).values()))
    if not trained:
        return
    conv_cfg = node.get('conv_cfg') or {}
    if type_name(conv_cfg) not in {kind.__name__ for kind in WS_CONVS}:
        cure = (
            'it is of another one' if context.ws else 'convert it with ws=True (--ws)'
        )
        raise InputError(
            f'pretrained: checkpoint {context.pretrained} was trained with weight '
            f'standardization (dialect={trained[0]!r}), which the backbone has not: '
            f'{cure}'
        )
    conv_cfg = ConfigDict(conv_cfg, dialect=trained[0])
    context.change(node, 'conv_cfg', conv_cfg, path, 'the dialect of its weights')


def _check_fits(context: Context, node: dict, state: State) -> None:
    """Make sure that weights are BCN's, and of this backbone.

    Raises:
        InputError: names the first tensor that is not.
    """
    path = f'pretrained: checkpoint {context.pretrained}'
    model = build_model({**node, 'init_cfg': None}, context.registry)
    for name, layer in model.named_modules():
        if isinstance(layer, BCN):
            layout = layout_of(state, f'{name}.', layer.num_channels)
            if layout in ('BatchNorm', 'GroupNorm'):
                raise InputError(
                    f'{path} was trained with {layout} ({name}), not with BCN; leave '
                    f'it to the config, whose checkpoints load as far as they fit'
                )
            if layout in INNER:
                return  # the authors' names; loading translates them
    for name, value in model.state_dict().items():
        given = getattr(state.get(name), 'shape', None)
        if given != value.shape and not name.endswith('num_batches_tracked'):
            given = 'absent' if given is None else tuple(given)
            raise InputError(
                f'{path} is of another backbone: {name} is {tuple(value.shape)} in '
                f'the model and {given} in the file'
            )
    check_dialects(model, state)


def _entries(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checkpoints(value: Any) -> list:
    """Of what initializes a component, the entries that load weights."""
    return [
        e
        for e in _entries(value)
        if isinstance(e, str) or (isinstance(e, dict) and 'checkpoint' in e)
    ]


def _per_group(replaced: Set[type]) -> bool:
    return any(issubclass(k, nn.GroupNorm) for k in replaced - {BCN})


def _review_checkpoint(
    context: Context,
    node: dict,
    key: str,
    path: str,
    replaced: Set[type],
    standardized: bool,
) -> None:
    """Keep a checkpoint of a model with these norms if it still fits."""
    value = node.get(key)
    loads = _checkpoints(value)
    if not loads or not replaced:
        return
    if standardized:
        rest = [e for e in _entries(value) if e not in loads]
        note = 'weights that were trained without standardization'
        context.change(node, key, rest or None, path, note)
        return
    note = (
        'GroupNorm weights: they load approximately'
        if _per_group(replaced)
        else 'BatchNorm weights: they load into the batch stage'
    )
    context.keep(f'{path}.{key}' if path else key, value, note)
