"""Norms and convolutions that a component's config or constructor names."""

import copy
import inspect
from typing import Any, Dict, List, Optional, Set, Tuple

from mmengine.config import ConfigDict
from torch import nn

from ..layers import BCN, is_replaceable
from ..layers.replace import stock_norm
from .context import WRAPPER, Change, Context
from .pretrained import unfreeze
from .tree import children, part_of, walk
from .types import type_name

# What takes the place of a convolution; others have no standardized
# counterpart and are left alone.
_BY_MMCV = ('ConvWS', 'ConvWS2d')  # as it is registered, and as a class
_STANDARDIZED = {
    '': 'WSConv2d',
    'Conv': 'WSConv2d',
    'Conv2d': 'WSConv2d',
    **dict.fromkeys(_BY_MMCV, 'WSConv2d'),
    'Conv1d': 'WSConv1d',
    'Conv3d': 'WSConv3d',
}
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def convert_components(context: Context, node: Any, path: str) -> None:
    """Convert all components in a part of a model's config, in place.

    Args:
        context (Context): Receives what is changed.
        node (object): A dict or a list; others hold no component.
        path (str): Its dotted name.
    """
    if isinstance(node, dict):
        _convert_component(context, node, path)
    else:
        for where, _, child in children(node, path):
            convert_components(context, child, where)


def _convert_component(context: Context, node: dict, path: str) -> None:
    kind = _class_of(context, node) if 'type' in node else None
    arguments = constructor_arguments(kind) if kind else {}
    selected = context.selects(path)
    defaults = _add_defaults(context, node, path, arguments) if selected else set()
    norms = []
    for where, key, value in list(children(node, path)):
        if key == 'init_cfg':
            continue
        norm = _norm_class(context, value)
        if norm is None:
            convert_components(context, value, where)
        elif _replace_norm(context, node, key, where, norm, key in defaults):
            norms.append((key, norm))
    if not norms or not selected:
        return
    context.norms[path] = [node[key] for key, _ in norms]
    stock = {norm for _, norm in norms if not issubclass(norm, BCN)}
    plain = context.ws and _standardize(context, node, path, arguments)
    if plain:
        context.standardized.add(part_of(path))
    if stock or plain:
        replaced = stock or {BCN}
        context.replaced[part_of(path)] |= replaced
        unfreeze(context, node, path, arguments, replaced, plain)


# -- norms -------------------------------------------------------------------


def _replace_norm(
    context: Context,
    node: dict,
    key: str,
    path: str,
    norm: type,
    by_default: bool,
) -> bool:
    """Replace a norm unless it stays; tells whether ``node[key]`` is a BCN."""
    value = node[key]
    if issubclass(norm, BCN):
        if context.selects(path):
            asked = ConfigDict({**value, **copy.deepcopy(context.asked)})
            if type_name(asked) == type_name(value):  # a class and its name, perhaps
                asked.type = value.type
            context.change(node, key, asked, path.rpartition('.')[0])
        return True
    if not is_replaceable(norm):
        context.keep(
            path,
            value,
            f'{norm.__name__} has a forward of its own and may do more than normalize'
            if stock_norm(norm)
            else f'{norm.__name__} is no norm of batches or groups',
        )
        return False
    if not context.selects(path):
        context.keep(path, value, 'not in --only')
        return False
    node[key], notes = _bcn_for(value, context.norm_cfg)
    if by_default:
        notes.insert(0, "the constructor's default")
    context.changes.append(
        Change(path, value, copy.deepcopy(node[key]), '; '.join(notes))
    )
    return True


def _bcn_for(norm: ConfigDict, norm_cfg: ConfigDict) -> Tuple[ConfigDict, List[str]]:
    """What replaces a norm, and notes on it.

    What its weights cannot do without is kept, and groups chosen by the
    config.
    """
    cfg, notes = copy.deepcopy(norm_cfg), []
    if norm.get('num_groups', 32) != 32:
        cfg.setdefault('num_groups', norm.num_groups)
    if not norm.get('affine', True):
        cfg.setdefault('affine', False)
    if norm.get('eps') and 'eps' not in cfg:  # some have 0, BCN cannot
        cfg.eps = norm.eps
        notes.append('eps kept, weights trained with it need it')
    return cfg, notes


def _add_defaults(
    context: Context, node: dict, path: str, arguments: Dict[str, Any]
) -> Set[str]:
    """Write down the norms that a component takes by default.

    Returns:
        set[str]: the names of these arguments.
    """
    before, added = dict(node), set()
    for name, default in arguments.items():
        if name not in node and _has_norm(context, default):
            node[name] = _as_config(default)
            added.add(name)
    if added:
        context.defaults[path] = node, before
    return added


def _has_norm(context: Context, value: Any) -> bool:
    """Whether a default value has a norm to replace, however deep."""
    return any(is_replaceable(_norm_class(context, node)) for _, node in walk(value))


def _as_config(value: Any) -> Any:
    return ConfigDict(dict(value=copy.deepcopy(value))).value


def _norm_class(context: Context, value: Any) -> Optional[type]:
    """The class of a norm's config; None for what is none."""
    if isinstance(value, dict) and 'type' in value:
        kind = _class_of(context, value)
        if inspect.isclass(kind) and (
            stock_norm(kind) is not None or issubclass(kind, _NORMS)
        ):
            return kind
    return None


def _class_of(context: Context, node: dict) -> Optional[type]:
    kind = node.get('type')
    if type_name(kind) == WRAPPER:
        kind = node.get('component')
    if isinstance(kind, str):
        try:
            kind = context.registry.get(kind)
        except Exception:  # an optional package is missing, for instance
            return None
    return kind if inspect.isclass(kind) else None


def constructor_arguments(kind: type) -> Dict[str, Any]:
    """The constructor arguments of a class, with their defaults.

    Those that it hands on to its base classes by ``**kwargs`` included.
    """
    found = {}
    for base in kind.__mro__:
        if '__init__' not in vars(base):
            continue
        try:
            signature = inspect.signature(base.__init__)
        except ValueError:
            break
        for name, p in signature.parameters.items():
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(name, p.default)
        if all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    found.pop('self', None)
    return found


# -- convolutions ------------------------------------------------------------


def _standardize(
    context: Context, node: dict, path: str, arguments: Dict[str, Any]
) -> bool:
    """Standardize the convolutions of a component; tells whether they were
    plain ones before."""
    if 'conv_cfg' not in arguments and 'conv_cfg' not in node:
        note = 'the component has no such setting'
        context.keep(f'{path}.conv_cfg', None, note)
        return False
    given = node.get('conv_cfg', arguments.get('conv_cfg'))
    kind = type_name(given)
    if kind in _STANDARDIZED:
        rest = {k: v for k, v in (given or {}).items() if k != 'type'}
        conv_cfg = ConfigDict(type=_STANDARDIZED[kind], **rest)
        context.change(node, 'conv_cfg', conv_cfg, path)
        return kind not in _BY_MMCV
    if kind not in _STANDARDIZED.values():
        note = f'{kind} has no standardized version'
        context.keep(f'{path}.conv_cfg', given, note)
    return False
