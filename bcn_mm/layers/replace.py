"""Putting BCN where a component does not let its config choose the norm."""

import inspect
import re
import warnings
from collections import defaultdict
from itertools import chain
from typing import Any, Dict, List, Optional, Tuple

import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..weights.norm_layouts import (
    adopt_batch_norm,
    adopt_group_norm,
    fill_num_batches_tracked,
)
from .bcn import BCN

_TORCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
)
#: ``MMSyncBN`` is none of torch's, and not everybody has mmcv's operators.
_MMCV_NORM = 'mmcv.ops.sync_bn.SyncBatchNorm'
#: All that a norm may hold if nothing is to be lost with it.
_NORM_ENTRIES = {
    'weight',
    'bias',
    'running_mean',
    'running_var',
    'num_batches_tracked',
}


def stock_norm(kind: Optional[type]) -> Optional[type]:
    """The BatchNorm, SyncBN or GroupNorm that a class is or inherits from.

    Returns:
        type, optional: torch's class, or mmcv's ``SyncBatchNorm``; None for
        other layers, and for BCN.
    """
    if not inspect.isclass(kind) or issubclass(kind, BCN):
        return None
    for base in kind.__mro__:
        if base in _TORCH_NORMS or f'{base.__module__}.{base.__name__}' == _MMCV_NORM:
            return base
    return None


def is_replaceable(kind: Optional[type]) -> bool:
    """Whether a layer class is a BatchNorm, SyncBN or GroupNorm, not a BCN.

    A subclass is one too unless it has a ``forward`` of its own, by which it
    may do more than normalize: timm's ``BatchNormAct2d`` applies an
    activation.
    """
    stock = stock_norm(kind)
    return stock is not None and kind.forward is stock.forward


def norms_kept(module: nn.Module) -> Dict[Tuple[str, str], List[str]]:
    """The BatchNorms, SyncBNs and GroupNorms that BCN cannot stand for.

    Returns:
        dict: (class name, reason) -> names of the layers.
    """
    found = defaultdict(list)
    for name, layer in module.named_modules():
        reason = stock_norm(type(layer)) and _reason_to_keep(layer)
        if reason:
            found[type(layer).__name__, reason].append(name)
    return dict(found)


def _reason_to_keep(norm: nn.Module) -> str:
    """What a norm does or holds that BCN would not; empty if nothing."""
    if not is_replaceable(type(norm)) or 'forward' in vars(norm):
        return 'it has a forward of its own and may do more than normalize'
    held = {*norm._parameters, *norm._buffers, *norm._modules} - _NORM_ENTRIES
    if held:  # a parametrization, a pruning mask, an activation ...
        return f'it holds {", ".join(sorted(held))}'
    return ''


@torch.no_grad()
def replace_norms(module: nn.Module, norm_cfg: Optional[dict] = None) -> nn.Module:
    """Replace every BatchNorm, SyncBN and GroupNorm in a module by BCN.

    What a norm learnt is taken over as when its checkpoint is loaded: a
    BatchNorm's parameters and running statistics, of a GroupNorm an
    approximation. Further, where ``norm_cfg`` does not say otherwise, its

    - ``eps``, without which the statistics would mean something else. BCN
      adds it to the variances of both its stages; the channel stage's affine
      pair, which gives back what is taken away, allows for it;
    - groups, and whether it has affine parameters;
    - ``requires_grad``: both weights of a BCN follow the norm's weight, both
      biases its bias; ``norm_cfg`` may have mmcv's ``requires_grad``;
    - device, dtype, training mode, and forward and backward hooks.

    A BatchNorm's ``momentum`` is not taken over, for BCN's estimates move with
    passes of one picture, at a rate of their own (see :class:`BCN`). A norm
    that is shared stays shared.

    A subclass with a ``forward`` of its own, which may do more than normalize
    (timm's ``BatchNormAct2d``), stays as it is, and so does a norm that holds
    more than a norm does, a parametrization for instance; a warning names
    them.

    Args:
        module (nn.Module): Changed in place.
        norm_cfg (dict, optional): What replaces the norms. Default:
            ``dict(type='BCN')``.

    Returns:
        nn.Module: ``module``, or its replacement if it is a norm itself.

    Raises:
        ValueError: if a lazy norm has not seen an input yet, or BCN refuses
            ``norm_cfg``; ``module`` is then as it was.

    Example:
        >>> replace_norms(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))[0]
        BCN(8, num_groups=4, ...)
    """
    new = {}
    for name, norm in module.named_modules():
        if not stock_norm(type(norm)) or _reason_to_keep(norm):
            continue
        if isinstance(norm, LazyModuleMixin):
            raise ValueError(
                f'{name or "the module"} is a {type(norm).__name__} that does '
                f'not know its channels yet: pass an input through the model '
                f'before its norms are replaced'
            )
        new[norm] = _replacement(norm, module, norm_cfg or dict(type='BCN'))
    for (kind, reason), names in norms_kept(module).items():
        warnings.warn(
            f'replace_norms leaves {len(names)} x {kind} as before (first: '
            f'{names[0] or "the module"}): {reason}',
            stacklevel=3,  # behind no_grad
        )
    for parent in list(module.modules()):
        # not named_children(), which names a child once
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(module, module)


def _replacement(norm: nn.Module, module: nn.Module, norm_cfg: dict) -> nn.Module:
    """A BCN that takes the place of a norm in a module."""
    per_group = isinstance(norm, nn.GroupNorm)
    channels = norm.num_channels if per_group else norm.num_features
    cfg = dict(norm_cfg, num_features=channels)
    trained = cfg.pop('requires_grad', None)
    cfg.setdefault('affine', norm.affine)
    if norm.eps > 0:  # some BatchNorms do without
        cfg.setdefault('eps', norm.eps)
    if per_group and norm.num_groups < channels:
        cfg.setdefault('num_groups', norm.num_groups)
    layer: BCN = MODELS.build(cfg)
    # a norm without parameters and statistics is where its module is
    for like in chain(
        norm.parameters(),
        norm.buffers(),
        module.parameters(),
        module.buffers(),
    ):
        if like.is_floating_point():
            layer.to(device=like.device, dtype=like.dtype)
            break
    _copy_state(layer, norm)
    given = {k: p for k, p in norm._parameters.items() if p is not None}
    for name, parameter in layer.named_parameters():
        own = given.get(name.replace('batch_', ''))
        if trained is not None:
            parameter.requires_grad_(trained)
        elif given:  # of a norm without a bias, as its weight
            own = next(iter(given.values())) if own is None else own
            parameter.requires_grad_(own.requires_grad)
    take_hooks(layer, norm)
    return layer.train(norm.training)


def _copy_state(layer: BCN, norm: nn.Module) -> None:
    state = norm.state_dict()
    if any(t.is_meta for t in state.values()):
        return
    if 'weight' in state and layer.affine:
        state.setdefault('bias', torch.zeros_like(state['weight']))
        per_group = isinstance(norm, nn.GroupNorm)
        adopt = adopt_group_norm if per_group else adopt_batch_norm
        adopt(state, '', layer.num_groups, layer.eps)
    fill_num_batches_tracked(state, '', layer.momentum)
    own = layer.state_dict()
    for name in own.keys() & state.keys():
        own[name].copy_(state[name])


def take_hooks(layer: nn.Module, old: nn.Module) -> None:
    """Give a layer the forward and backward hooks of what it stands for.

    The very dicts, by which the handles of the hooks still remove them.
    """
    for name, hooks in vars(old).items():
        if re.match(r'_(for|back)ward_(pre_)?hooks', name):
            hooks.update(getattr(layer, name))
            setattr(layer, name, hooks)
    layer._is_full_backward_hook = old._is_full_backward_hook


@MODELS.register_module()
def WithBCN(component: str, bcn_cfg: Optional[dict] = None, **kwargs: Any) -> nn.Module:
    """Build a component and replace the norms in it, of whatever origin.

    For components that build norms without asking their config. In a config,
    ``dict(type='WithBCN', component='DilatedEncoder', ...)`` stands for
    ``dict(type='DilatedEncoder', ...)``; what is built is a
    ``DilatedEncoder``, whose layers are named as ever.

    Args:
        component (str): The registered type.
        bcn_cfg (dict, optional): What replaces the norms, see
            :func:`replace_norms`. Default: ``dict(type='BCN')``.
        **kwargs: The component's own arguments.

    Returns:
        nn.Module: The component.
    """
    return replace_norms(MODELS.build(dict(type=component, **kwargs)), bcn_cfg)
