"""Putting BCN where a component does not let its config choose the norm."""

import inspect
from typing import Optional

import torch
from mmengine.registry import MODELS
from torch import nn

from .bcn import BCN
from .layouts import adopt_batch_norm


def is_replaceable(kind: type) -> bool:
    """Whether a layer class is a BatchNorm, SyncBN or GroupNorm, not a BCN."""
    return (
        inspect.isclass(kind)
        and issubclass(kind, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
        and not issubclass(kind, BCN)
    )


@torch.no_grad()
def replace_norms(
    module: nn.Module, norm_cfg: Optional[dict] = None
) -> nn.Module:
    """Replace every BatchNorm, SyncBN and GroupNorm in a module by BCN.

    A BatchNorm's parameters and running statistics are taken as when its
    checkpoint is loaded; of a GroupNorm its groups.

    Args:
        module (nn.Module): Changed in place.
        norm_cfg (dict, optional): What replaces the norms. Default:
            ``dict(type='BCN')``.

    Returns:
        nn.Module: ``module``, or its replacement if it is a norm itself.

    Example:
        >>> replace_norms(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))[0]
        BCN(8, num_groups=4, ...)
    """
    norm_cfg = norm_cfg or dict(type='BCN')
    done = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if is_replaceable(type(child)):
                if child not in done:
                    done[child] = _replacement(child, norm_cfg)
                setattr(parent, name, done[child])
    if is_replaceable(type(module)):
        return _replacement(module, norm_cfg)
    return module


def _replacement(norm: nn.Module, norm_cfg: dict) -> nn.Module:
    per_group = isinstance(norm, nn.GroupNorm)
    channels = norm.num_channels if per_group else norm.num_features
    cfg = dict(norm_cfg, num_features=channels)
    if per_group and norm.num_groups < channels:
        cfg.setdefault('num_groups', norm.num_groups)
    layer = MODELS.build(cfg)
    tensors = [*norm.parameters(), *norm.buffers()]
    if tensors:
        layer.to(tensors[0].device)
    if not per_group:
        state = norm.state_dict()
        adopt_batch_norm(state, '', layer.num_groups, layer.eps)
        own = layer.state_dict()
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])
    return layer.train(norm.training)


@MODELS.register_module()
def WithBCN(
    component: str, bcn_cfg: Optional[dict] = None, **kwargs
) -> nn.Module:
    """Build a component and replace the norms in it, of whatever origin.

    For components that build norms without asking their config. In a config,
    ``dict(type='WithBCN', component='DilatedEncoder', ...)`` stands for
    ``dict(type='DilatedEncoder', ...)``; what is built is a
    ``DilatedEncoder``, whose layers are named as ever.

    Args:
        component (str): The registered type.
        bcn_cfg (dict, optional): What replaces the norms. Default:
            ``dict(type='BCN')``.
        **kwargs: The component's own arguments.

    Returns:
        nn.Module: The component.
    """
    return replace_norms(MODELS.build(dict(type=component, **kwargs)), bcn_cfg)
