"""Turning a stock config into a BCN config."""

import copy
import importlib.util
import inspect
import os
import os.path as osp
import tempfile
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import chain
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from .layers import BCN, is_replaceable
from .layers.convert import norms_kept, stock_norm
from .weights.reading import read_checkpoint

# What takes the place of a convolution with --ws; others have no standardized
# counterpart and are left alone.
_STANDARDIZED = {
    None: 'WSConv2d',
    'Conv': 'WSConv2d',
    'Conv2d': 'WSConv2d',
    'ConvWS': 'WSConv2d',
    'Conv1d': 'WSConv1d',
    'Conv3d': 'WSConv3d',
}
_HOOK = 'SyncEstimatesHook'
_WRAPPER = 'WithBCN'


class Change(NamedTuple):
    """One thing that :func:`to_bcn` did, or saw and left alone.

    Attributes:
        path (str): Of the setting, dotted.
        before (object): Its value; None if it was not set.
        after (object): Its new value; ``before`` if left alone.
        note (str): Why, where that is not obvious.
    """

    path: str
    before: Any
    after: Any
    note: str = ''


def _is_norm(kind: type) -> bool:
    return inspect.isclass(kind) and (
        stock_norm(kind) is not None
        or issubclass(
            kind,
            (
                nn.modules.batchnorm._NormBase,
                nn.GroupNorm,
                nn.LayerNorm,
                nn.LocalResponseNorm,
            ),
        )
    )


@contextmanager
def in_scope(cfg: Config) -> Iterator[Any]:
    """The model registry of a config's scope, e.g. mmdet's."""
    scope = cfg.get('default_scope') or 'mmengine'
    with (
        DefaultScope.overwrite_default_scope(scope),
        MODELS.switch_scope_and_registry(scope) as registry,
    ):
        yield registry


def parameters_of(kind: type) -> Dict[str, Any]:
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
        if all(
            p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()
        ):
            break
    found.pop('self', None)
    return found


class _Converter:
    """Walks through a model's config and notes what it changes."""

    def __init__(self, registry, norm_cfg, ws, only, pretrained) -> None:
        self.registry = registry
        self.norm_cfg = norm_cfg
        self.ws = ws
        self.only = only
        self.pretrained = pretrained
        self.changes: List[Change] = []
        # the BCN dicts of each component that has some
        self.norms: Dict[str, List[dict]] = {}
        # components that take norms by default: path -> (dict, as it was)
        self.implicit: Dict[str, Tuple[dict, dict]] = {}
        # the norm classes that were replaced in each part
        self.kinds: Dict[str, set] = defaultdict(set)
        # the parts whose plain convolutions were standardized
        self.plain = set()

    def set(self, node, key, value, path, note='') -> None:
        before = node.get(key)
        if before != value:
            node[key] = value
            where = f'{path}.{key}' if path else key
            self.changes.append(
                Change(where, before, copy.deepcopy(value), note)
            )

    def class_of(self, node) -> Optional[type]:
        kind = node.get('type')
        if kind == _WRAPPER:
            kind = node.get('component')
        if isinstance(kind, str):
            try:
                kind = self.registry.get(kind)
            except Exception:  # an optional package is missing, for instance
                return None
        return kind if inspect.isclass(kind) else None

    def norm_class(self, value) -> Optional[type]:
        if isinstance(value, dict) and 'type' in value:
            kind = self.class_of(value)
            if _is_norm(kind):
                return kind
        return None

    def mentions_norm(self, value) -> bool:
        """Whether a default value has a norm to replace, however deep."""
        if isinstance(value, dict):
            return is_replaceable(self.norm_class(value)) or any(
                map(self.mentions_norm, value.values())
            )
        return isinstance(value, (list, tuple)) and any(
            map(self.mentions_norm, value)
        )

    def wanted(self, path: str) -> bool:
        return self.only is None or part_of(path) in self.only

    def visit(self, node, path: str) -> None:
        if isinstance(node, (list, tuple)):
            for i, child in enumerate(node):
                self.visit(child, f'{path}.{i}')
        if not isinstance(node, dict):
            return
        kind = self.class_of(node) if 'type' in node else None
        arguments = parameters_of(kind) if kind else {}
        here = self.wanted(path)
        before, implicit = dict(node), {}
        for name, default in arguments.items():
            if here and name not in node and self.mentions_norm(default):
                implicit[name] = node[name] = _as_config(default)
        if implicit:
            self.implicit[path] = node, before
        norms = []
        for key in list(node):
            value, where = node[key], f'{path}.{key}'
            if key == 'init_cfg':
                continue
            norm = self.norm_class(value)
            if norm is None:
                self.visit(value, where)
            elif issubclass(norm, BCN):
                norms.append((key, norm))
            elif not is_replaceable(norm):
                self.leave(
                    where,
                    value,
                    f'{norm.__name__} has a forward of its own and may do '
                    f'more than normalize'
                    if stock_norm(norm)
                    else f'{norm.__name__} is no norm of batches or groups',
                )
            elif not self.wanted(where):
                self.leave(where, value, 'not in --only')
            else:
                node[key], notes = self.bcn_for(value)
                if key in implicit:
                    notes.insert(0, "the constructor's default")
                self.changes.append(
                    Change(
                        where,
                        value,
                        copy.deepcopy(node[key]),
                        '; '.join(notes),
                    )
                )
                norms.append((key, norm))
        if norms and here:
            self.norms[path] = [node[key] for key, _ in norms]
            stock = {norm for _, norm in norms if not issubclass(norm, BCN)}
            plain = self.ws and self.standardize(node, path, arguments)
            if plain:
                self.plain.add(part_of(path))
            if stock or plain:
                self.kinds[part_of(path)] |= stock or {BCN}
                self.unfreeze(node, path, arguments, stock, plain)

    def bcn_for(self, norm) -> Tuple[ConfigDict, List[str]]:
        """What replaces a norm, and notes on it.

        What its weights cannot do without is kept, and groups chosen by the
        config.
        """
        cfg, notes = copy.deepcopy(self.norm_cfg), []
        if norm.get('num_groups', 32) != 32:
            cfg.setdefault('num_groups', norm.num_groups)
        if not norm.get('affine', True):
            cfg.setdefault('affine', False)
        if norm.get('eps') and 'eps' not in cfg:  # some have 0, BCN cannot
            cfg.eps = norm.eps
            notes.append('eps kept, weights trained with it need it')
        return cfg, notes

    def undo(self, path) -> None:
        """Leave to its default again what a component takes by default."""
        node, before = self.implicit.pop(path)
        node.clear()
        node.update(before)
        self.norms.pop(path, None)
        self.changes = [
            c for c in self.changes if c.path.rpartition('.')[0] != path
        ]

    def leave(self, path, value, note) -> None:
        self.changes.append(Change(path, value, value, note))

    def unfreeze(self, node, path, arguments, stock, plain) -> None:
        """What else a component needs whose norms or weights are others."""
        if node.get('norm_eval', arguments.get('norm_eval')) is True:
            self.set(node, 'norm_eval', False, path)
        given = self.pretrained and part_of(path) == 'backbone'
        # what stands for none differs: -1 in most, 0 in EfficientNet
        none = arguments.get('frozen_stages', -1)
        if node.get('frozen_stages', none) != none and not given:
            self.set(node, 'frozen_stages', none, path,
                     'no BCN weights to freeze')  # fmt: skip
        if not given:
            for key in ('init_cfg', 'pretrained'):
                self.initialize(node, key, path, stock or {BCN}, plain)

    def initialize(self, node, key, path, kinds, plain) -> None:
        """Keep a checkpoint of a model with these norms if it still fits."""
        value = node.get(key)
        entries = value if isinstance(value, (list, tuple)) else [value]
        loads = [
            e
            for e in entries
            if isinstance(e, str)
            or (isinstance(e, dict) and 'checkpoint' in e)
        ]
        if not loads or not kinds:
            return
        if plain:
            rest = [e for e in entries if e not in loads]
            self.set(node, key, rest or None, path, 'weights that were '
                     'trained without standardization')  # fmt: skip
            return
        per_group = any(issubclass(k, nn.GroupNorm) for k in kinds - {BCN})
        note = (
            'GroupNorm weights: they load approximately'
            if per_group
            else 'BatchNorm weights: they load into the batch stage'
        )
        self.leave(f'{path}.{key}' if path else key, value, note)

    def standardize(self, node, path, arguments) -> bool:
        """Standardize the convolutions of a component; tells whether they
        were plain ones before."""
        if 'conv_cfg' not in arguments and 'conv_cfg' not in node:
            self.leave(f'{path}.conv_cfg', None,
                       'the component has no such setting')  # fmt: skip
            return False
        given = node.get('conv_cfg', arguments.get('conv_cfg'))
        kind = (given or {}).get('type')
        if kind in _STANDARDIZED:
            rest = {k: v for k, v in (given or {}).items() if k != 'type'}
            self.set(node, 'conv_cfg',
                     ConfigDict(type=_STANDARDIZED[kind], **rest),
                     path)  # fmt: skip
            return kind != 'ConvWS'
        if kind not in _STANDARDIZED.values():
            self.leave(f'{path}.conv_cfg', given,
                       f'{kind} has no standardized version')  # fmt: skip
        return False


def _as_config(value):
    return ConfigDict(dict(value=copy.deepcopy(value))).value


def part_of(path: str) -> str:
    """What ``--only`` calls the part of a model that a setting belongs to.

    Example:
        >>> [part_of(p) for p in ('model.backbone.norm_cfg',
        ...                       'model.roi_head.mask_head')]
        ['backbone', 'heads']
    """
    for word in path.split('.'):
        if word in ('backbone', 'neck'):
            return word
        if word == 'head' or word.endswith(('_head', '_heads')):
            return 'heads'
    return 'other'


PARTS = ('backbone', 'neck', 'heads', 'other')


def to_bcn(
    cfg: Config,
    norm_cfg: Optional[dict] = None,
    ws: bool = False,
    only: Optional[Sequence[str]] = None,
    batch_size: Optional[int] = None,
    pretrained: Optional[str] = None,
    changes: Optional[List[Change]] = None,
) -> Config:
    """Make a BCN config of any config of mmdet, mmsegmentation or their kin.

    Every BatchNorm, SyncBN and GroupNorm that the model's config names, or
    that a component takes by its constructor's default, becomes BCN, with the
    ``eps`` that its config gives (of BatchNorm and of GroupNorm), so that
    weights which were trained with it still fit, and without affine
    parameters where it has none. Norms of other kinds stay, and subclasses
    with a ``forward`` of their own, which may do more than normalize. Further:

    - a component that builds norms without asking its config is built
      through :func:`bcn_mm.WithBCN`;
    - a head that pyramid levels share gets an estimate for each of them
      (``num_levels``);
    - ``norm_eval`` is turned off, and ``frozen_stages`` unless ``pretrained``
      names weights that were trained with BCN;
    - checkpoints in ``init_cfg``, ``pretrained`` and ``load_from`` go where
      convolutions are standardized that were not; those of BatchNorm models
      load otherwise, those of GroupNorm models approximately;
    - bcn_mm is imported and :class:`~bcn_mm.SyncEstimatesHook` added.

    The last two of the first three are found out by building the model,
    without weights, and passing a picture through it. Converting a converted
    config changes nothing.

    Args:
        cfg (Config): Left as it is.
        norm_cfg (dict, optional): What replaces the norms. Default:
            ``dict(type='BCN')``.
        ws (bool): Whether the convolutions of the components whose norms are
            replaced become weight-standardized. Default: False.
        only (Sequence[str], optional): The parts to convert, of
            ``'backbone'``, ``'neck'``, ``'heads'`` and ``'other'``. Default:
            all.
        batch_size (int, optional): Images per GPU. The learning rate and the
            batch size that it is meant for are scaled by the same factor.
            Default: as in ``cfg``.
        pretrained (str, optional): A checkpoint of the backbone, trained with
            BCN. Default: None.
        changes (list, optional): Receives a :class:`Change` for everything
            that was changed, or left alone for a reason.

    Returns:
        Config: The converted copy.

    Raises:
        ValueError: if the config has no model, ``only`` names no part or
            ``batch_size`` does not fit the config.

    Example:
        >>> cfg = read_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
        >>> to_bcn(cfg).model.backbone.norm_cfg
        {'type': 'BCN'}
    """
    unknown = set(only or ()) - set(PARTS)
    if unknown:
        raise ValueError(
            f'unknown part {", ".join(sorted(unknown))}; choose among '
            f'{", ".join(PARTS)}'
        )
    if 'model' not in cfg:
        raise ValueError('the config has no model')
    cfg = copy.deepcopy(cfg)
    norm_cfg = ConfigDict(norm_cfg or dict(type='BCN'))
    with in_scope(cfg) as registry:
        walk = _Converter(registry, norm_cfg, ws, only, pretrained)
        walk.visit(cfg.model, 'model')
        node, path = _detector(cfg.model, 'model')
        if pretrained:
            _start_from(node, path, pretrained, walk)
        else:
            walk.initialize(
                node,
                'pretrained',
                path,
                walk.kinds['backbone'],
                'backbone' in walk.plain,
            )
        kinds = set().union(*walk.kinds.values())
        walk.initialize(cfg, 'load_from', '', kinds, bool(walk.plain))
        _see_the_model(node, path, walk)
        if walk.norms:
            _register(cfg, walk)
    if batch_size is not None:
        _scale_batch(cfg, batch_size, walk)
    if changes is not None:
        changes += walk.changes
    return cfg


def _start_from(node, path, pretrained, walk) -> None:
    """Initialize the backbone from a checkpoint that fits."""
    if 'backbone' not in node:
        raise ValueError('pretrained: the model has no backbone')
    init_cfg = ConfigDict(type='Pretrained', checkpoint=pretrained)
    if osp.isfile(pretrained):
        state = read_checkpoint(pretrained)['state_dict']
        if any(key.startswith('backbone.') for key in state):
            init_cfg.prefix = 'backbone.'
    walk.set(node.backbone, 'init_cfg', init_cfg, f'{path}.backbone')
    if node.get('pretrained'):
        walk.set(node, 'pretrained', None, path)


def _detector(node, path):
    """The outermost part of a model's config that has a backbone.

    That is the model itself, or what a semi-supervised or a video model
    wraps.
    """
    if 'backbone' in node:
        return node, path
    for key, value in node.items():
        if isinstance(value, dict) and 'backbone' in value:
            return value, f'{path}.{key}'
    return node, path


def _register(cfg, walk) -> None:
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if 'bcn_mm' not in names:
        walk.set(cfg, 'custom_imports',
                 ConfigDict({**imports, 'imports': names + ['bcn_mm']}),
                 '')  # fmt: skip
    hooks = list(cfg.get('custom_hooks') or [])
    if all(hook.get('type') != _HOOK for hook in hooks):
        walk.set(cfg, 'custom_hooks', hooks + [ConfigDict(type=_HOOK)], '')


def _scale_batch(cfg, batch_size, walk) -> None:
    """Images per GPU, and what is proportional to them."""
    loader = cfg.get('train_dataloader')
    if not isinstance(loader, dict) or 'batch_size' not in loader:
        raise ValueError('batch_size: the config has no train_dataloader')
    if batch_size < 1:
        raise ValueError(f'batch_size must be positive, got {batch_size}')
    factor = batch_size / loader.batch_size
    if factor == 1:
        return
    if 'source_ratio' in (loader.get('sampler') or {}):
        raise ValueError(
            'batch_size: this config mixes sources in each batch (sampler.'
            'source_ratio); set both by hand'
        )
    walk.set(loader, 'batch_size', batch_size, 'train_dataloader')
    note = f'times {factor:g}'
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if 'lr' in optimizer:
        walk.set(optimizer, 'lr', optimizer.lr * factor,
                 'optim_wrapper.optimizer', note)  # fmt: skip
    schedulers = cfg.get('param_scheduler') or []
    if isinstance(schedulers, dict):
        schedulers = [schedulers]
    for i, scheduler in enumerate(schedulers):
        if scheduler.get('eta_min') and 'Momentum' not in scheduler.type:
            walk.set(scheduler, 'eta_min', scheduler.eta_min * factor,
                     f'param_scheduler.{i}', note)  # fmt: skip
    scale = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' in scale:
        walk.set(scale, 'base_batch_size',
                 max(1, round(scale.base_batch_size * factor)),
                 'auto_scale_lr', note)  # fmt: skip


def _see_the_model(node, path, walk) -> None:
    """Settle what only the built model shows."""
    try:
        model = _build(node, walk)
    except Exception as e:
        walk.leave(path, None, 'could not be built, to look for norms that '
                   f'the config does not mention: {describe(e)}')  # fmt: skip
        return
    _wrap(node, path, model, walk)
    if any(part_of(p) == 'heads' for p in walk.norms):
        _separate_levels(node, path, walk)


def _build(node, walk) -> nn.Module:
    """The converted model.

    Where a component is handed its norm by the one around it, it must not
    have one in the config too: such are found out and left as they were. If
    nothing helps, the reason is another, and all stays as it is.
    """
    before = copy.deepcopy(node), dict(walk.norms), list(walk.changes)
    reason = None
    for path in [None, *sorted(walk.implicit, key=len, reverse=True)]:
        if path is not None:
            walk.undo(path)
        try:
            return build_model(node, walk.registry)
        except Exception as e:
            reason = reason or e
    node.clear()
    node.update(before[0])
    walk.norms, walk.changes = before[1:]
    raise reason


def _components(node, path='') -> Iterator[Tuple[str, dict]]:
    """Every dict with a type in a config, and where its module is found."""
    if isinstance(node, dict):
        if 'type' in node:
            yield path, node
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return
    for key, child in children:
        yield from _components(child, f'{path}.{key}' if path else str(key))


def _innermost(name: str, paths: Iterable[str]) -> Optional[str]:
    """Which of these config paths a layer of this name belongs to."""
    inside = [p for p in paths if p and f'{name}.'.startswith(f'{p}.')]
    return max(inside, key=len, default=None)


def _wrap(node, path, model, walk) -> None:
    """Reach the norms that components build without asking the config."""
    components = dict(_components(node))
    found = defaultdict(list)
    for kind, names in leftovers(model).items():
        for name in names:
            found[_innermost(name, components), kind].append(name)
    for (owner, kind), names in found.items():
        where = f'{path}.{owner}' if owner else path
        what = f'{len(names)} x {kind}'
        if not walk.wanted(where):
            walk.leave(where, what, 'not in --only')
            continue
        if owner is None:
            walk.leave(where, what, 'belongs to no component of the config')
            continue
        component = components[owner]
        if component.type != _WRAPPER:
            before = component.type
            component.component = component.type
            component.type = _WRAPPER
            component.bcn_cfg = copy.deepcopy(walk.norm_cfg)
            walk.changes.append(
                Change(f'{where}.type', before, _WRAPPER, f'{what} that it '
                       'builds without asking its config')
            )  # fmt: skip
            walk.norms.setdefault(where, []).append(component.bcn_cfg)
    for (kind, reason), names in norms_kept(model).items():
        owners = Counter(_innermost(name, components) for name in names)
        for owner, count in owners.items():
            where = f'{path}.{owner}' if owner else path
            walk.leave(where, f'{count} x {kind}', reason)


def _separate_levels(node, path, walk) -> None:
    """Give ``num_levels`` to the heads that pyramid levels share."""
    try:
        sizes = _sizes_seen(node, walk.registry)
    except Exception as e:
        walk.leave(path, None, 'no picture passes through it, to look for '
                   f'heads that levels share: {describe(e)}')  # fmt: skip
        return
    seen = defaultdict(list)
    for name, sizes_of_layer in sizes.items():
        owner = _innermost(f'{path}.{name}', walk.norms)
        if owner is not None and part_of(owner) == 'heads':
            seen[owner].append(sizes_of_layer)
    for owner, layers in seen.items():
        counts = {len(s) for s in layers}
        if counts == {1}:
            continue
        falling = all(
            s == sorted(s, reverse=True) and s[0] > s[-1] for s in layers
        )
        if len(counts) == 1 and falling:
            (levels,) = counts
            for norm in walk.norms[owner]:
                walk.set(norm, 'num_levels', levels, f'{owner}.norm_cfg',
                         f'{levels} levels share the norms')  # fmt: skip
        else:
            walk.leave(f'{owner}.norm_cfg', walk.norms[owner][0],
                       'some of its norms are used more than once a picture, '
                       'but not all by pyramid levels alike')  # fmt: skip


def build_model(
    node: dict, registry, device: Optional[str] = None
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
    (:func:`bcn_mm.layers.convert.norms_kept`).

    Returns:
        dict: class name -> names of the layers.
    """
    kept = set(chain(*norms_kept(model).values()))
    found = defaultdict(list)
    for name, layer in model.named_modules():
        if is_replaceable(type(layer)) and name not in kept:
            found[type(layer).__name__].append(name)
    return dict(found)


def _sizes_seen(node: dict, registry) -> Dict[str, List[int]]:
    """The spatial size of every input of every BCN while a picture passes.

    As far as the model gets: what follows a step that needs more than a
    picture, proposals for instance, is not seen.
    """
    seen = defaultdict(list)

    def record(name):
        return lambda _, x: seen[name].append(x[0].shape[2:].numel())

    # operators of mmcv's own are not there on the meta device
    for device, size in (('meta', 512), ('cpu', 256)):
        seen.clear()
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
            if device == 'cpu' and not seen:
                raise
    return seen


def describe(error: Exception) -> str:
    """An error in one line, its type first."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'


def read_config(source: str) -> Config:
    """Read a config file, or one of an installed package.

    Args:
        source (str): A path, or ``'mmdet::...'``, ``'mmseg::...'`` and so on.

    Raises:
        FileNotFoundError: if there is none.
    """
    if '::' not in source:
        if not osp.isfile(source):
            raise FileNotFoundError(f'config {source} does not exist')
        return Config.fromfile(source)
    package, name = source.split('::', 1)
    if importlib.util.find_spec(package) is None:
        raise FileNotFoundError(f'{source}: {package} is not installed')
    # inherited as it will be: mmengine then notes the scope in every part
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'config.py')
        with open(path, 'w') as file:
            file.write(f'_base_ = {source!r}\n')
        try:
            return Config.fromfile(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f'{source}: {package} ships no config {name}'
            ) from None


def difference(base: dict, new: dict) -> dict:
    """What a config that inherits from ``base`` must say to be ``new``."""
    if set(base) - set(new):
        return dict(_delete_=True, **new)
    found = {}
    for key, value in new.items():
        if key in base and base[key] == value:
            continue
        inner = base.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = difference(inner, value)
        elif isinstance(value, dict) and key in base:
            value = dict(_delete_=True, **value)
        found[key] = value
    return found


def write_config(cfg: Config, source: str, path: str) -> None:
    """Write a config as a thin one that inherits from its source.

    Args:
        cfg (Config): What the written config shall say.
        source (str): What it was made from, as for :func:`read_config`.
        path (str): The file to write, ``*.py``; it is replaced at once, when
            what it says was read back and found right.

    Raises:
        RuntimeError: if the written config does not say what it should.
    """
    folder = osp.dirname(osp.abspath(path))
    os.makedirs(folder, exist_ok=True)
    stock = read_config(source)
    base = source if '::' in source else osp.relpath(source, folder)
    text = Config(difference(stock.to_dict(), cfg.to_dict())).pretty_text
    draft = f'{path}.part.py'
    try:
        with open(draft, 'w') as file:
            file.write(f'_base_ = {base!r}\n{text}')
        if Config.fromfile(draft).to_dict() != cfg.to_dict():
            raise RuntimeError(f'{path}: cannot be written as a config that '
                               f'inherits from {source}')  # fmt: skip
        os.replace(draft, path)
    finally:
        if osp.exists(draft):
            os.remove(draft)
