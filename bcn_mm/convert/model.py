"""What only the built model shows: norms that no config names, and levels."""

import copy
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import chain
from typing import Callable, Dict, Iterator, List, Optional

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import nn

from ..layers import BCN, is_replaceable
from ..layers.replace import norms_kept
from .context import WRAPPER, Change, Context
from .tree import innermost, part_of, walk
from .types import scope_of, type_name


@contextmanager
def in_scope(cfg: Config) -> Iterator[Registry]:
    """The model registry of a config's scope, e.g. mmdet's."""
    scope = scope_of(cfg) or 'mmengine'
    switched = MODELS.switch_scope_and_registry(scope)
    with DefaultScope.overwrite_default_scope(scope), switched as registry:
        yield registry


def build_model(
    node: dict, registry: Registry, device: Optional[str] = None
) -> nn.Module:
    """A model from its config alone: no checkpoint is read.

    Args:
        node (dict): The model's config, left as it is.
        registry (Registry): See :func:`in_scope`.
        device (str, optional): Default: None, ``'meta'``, which takes
            neither time nor memory, or the CPU for models that cannot be
            built there.
    """
    if device is None:
        try:
            return build_model(node, registry, 'meta')
        except Exception:
            device = 'cpu'
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return registry.build(copy.deepcopy(node))


def leftovers(model: nn.Module) -> Dict[str, List[str]]:
    """The BatchNorms, SyncBNs and GroupNorms in a model, BCN excepted.

    Without those that BCN cannot stand for
    (:func:`bcn_mm.layers.replace.norms_kept`).

    Returns:
        dict: class name -> names of the layers.
    """
    kept = set(chain(*norms_kept(model).values()))
    found = defaultdict(list)
    for name, layer in model.named_modules():
        if is_replaceable(type(layer)) and name not in kept:
            found[type(layer).__name__].append(name)
    return dict(found)


def describe(error: Exception) -> str:
    """An error in one line, its type first."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'


def convert_by_model(context: Context, node: dict, path: str) -> None:
    """Convert, in place, what a model's config does not show.

    Args:
        context (Context): Receives what is changed.
        node (dict): The model's config, its components converted.
        path (str): Its dotted name.
    """
    try:
        model = _build_converted(context, node)
    except Exception as e:
        note = (
            f'could not be built, to look for norms that the config does not '
            f'mention: {describe(e)}'
        )
        context.keep(path, None, note)
        return
    _wrap_components(context, node, path, model)
    if any(part_of(p) == 'heads' for p in context.norms):
        _separate_levels(context, node, path)


def _build_converted(context: Context, node: dict) -> nn.Module:
    """The converted model.

    Where a component is handed its norm by the one around it, it must not
    have one in the config too: such are found out and left as they were. If
    nothing helps, the reason is another, and all stays as it is.
    """
    before = copy.deepcopy(node), dict(context.norms), list(context.changes)
    reason = None
    for path in [None, *sorted(context.defaults, key=len, reverse=True)]:
        if path is not None:
            context.drop_defaults(path)
        try:
            return build_model(node, context.registry)
        except Exception as e:
            reason = reason or e
    node.clear()
    node.update(before[0])
    context.norms, context.changes = before[1:]
    raise reason


def _wrap_components(context: Context, node: dict, path: str, model: nn.Module) -> None:
    """Reach the norms that components build without asking the config."""
    components = {name: n for name, n in walk(node) if 'type' in n}
    found = defaultdict(list)
    for kind, names in leftovers(model).items():
        for name in names:
            found[innermost(name, components), kind].append(name)
    for (owner, kind), names in found.items():
        where = f'{path}.{owner}' if owner else path
        what = f'{len(names)} x {kind}'
        if not context.selects(where):
            context.keep(where, what, 'not in --only')
            continue
        if owner is None:
            context.keep(where, what, 'belongs to no component of the config')
            continue
        component = components[owner]
        if type_name(component) != WRAPPER:
            before = component.type
            component.component = component.type
            component.type = WRAPPER
            component.bcn_cfg = copy.deepcopy(context.norm_cfg)
            note = f'{what} that it builds without asking its config'
            context.changes.append(Change(f'{where}.type', before, WRAPPER, note))
            context.norms.setdefault(where, []).append(component.bcn_cfg)
    for (kind, reason), names in norms_kept(model).items():
        owners = Counter(innermost(name, components) for name in names)
        for owner, count in owners.items():
            where = f'{path}.{owner}' if owner else path
            context.keep(where, f'{count} x {kind}', reason)


def _separate_levels(context: Context, node: dict, path: str) -> None:
    """Give ``num_levels`` to the heads that pyramid levels share."""
    try:
        sizes = _input_sizes(node, context.registry)
    except Exception as e:
        note = (
            f'no picture passes through it, to look for heads that levels '
            f'share: {describe(e)}'
        )
        context.keep(path, None, note)
        return
    heads = defaultdict(list)
    for name, sizes_of_layer in sizes.items():
        owner = innermost(f'{path}.{name}', context.norms)
        if owner is not None and part_of(owner) == 'heads':
            heads[owner].append(sizes_of_layer)
    for owner, layers in heads.items():
        where = f'{owner}.norm_cfg'
        counts = {len(s) for s in layers}
        if counts == {1}:
            continue
        falling = all(s == sorted(s, reverse=True) and s[0] > s[-1] for s in layers)
        if len(counts) == 1 and falling:
            (levels,) = counts
            note = f'{levels} levels share the norms'
            for norm in context.norms[owner]:
                context.change(norm, 'num_levels', levels, where, note)
        else:
            note = (
                'some of its norms are used more than once a picture, but not '
                'all by pyramid levels alike'
            )
            context.keep(where, context.norms[owner][0], note)


def _input_sizes(node: dict, registry: Registry) -> Dict[str, List[int]]:
    """The spatial size of every input of every BCN while a picture passes.

    As far as the model gets: what follows a step that needs more than a
    picture, proposals for instance, is not seen.
    """
    sizes = defaultdict(list)

    def record(name: str) -> Callable[..., None]:
        return lambda _, x: sizes[name].append(x[0].shape[2:].numel())

    # operators of mmcv's own are not there on the meta device
    for device, size in (('meta', 512), ('cpu', 256)):
        sizes.clear()
        try:
            model = build_model(node, registry, device).eval()
            for name, layer in model.named_modules():
                if isinstance(layer, BCN):
                    layer.register_forward_pre_hook(record(name))
            picture = torch.zeros(1, 3, size, size, device=device)
            with torch.no_grad():
                model(picture, None, mode='tensor')
            break
        except Exception:
            if device == 'cpu' and not sizes:
                raise
    return sizes
