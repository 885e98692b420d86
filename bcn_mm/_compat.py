"""Every patch of mmengine, mmcv and torch that bcn_mm makes.

:func:`apply` makes those that importing ``bcn_mm`` stands for, so that stock
tools have them through ``custom_imports``; the tools here add
:func:`refuse_code`. (That of activation checkpointing is made by
:mod:`bcn_mm.ops`, which works without the mm packages.)
"""

import functools
import importlib.util
import sys
from functools import partial, wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Callable, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn
from torch.nn.utils import fusion

from .layers import WS_CONVS
from .layers.replace import take_hooks
from .weights.loading import part_of_state, prepare_state_dict
from .weights.norm_layouts import State
from .weights.unpickling import allow_mmengine_checkpoints, as_data


def apply() -> None:
    """Make the patches of an ``import bcn_mm``."""
    allow_mmengine_checkpoints()
    extend_loading()
    extend_fusion()
    offer_configs()


# -- reading checkpoints ------------------------------------------------------


def refuse_code() -> None:
    """Let mmengine read checkpoints weights only, whatever the stack.

    Before torch 2.6, whose ``torch.load`` runs what a file holds unless it is
    told not to. And in the fork, which tries that, with ``getattr`` of anything
    allowed, and where it fails it runs what the file holds.
    """
    if not hasattr(torch.load, '__wrapped__'):
        torch.load = as_data(torch.load)
    if hasattr(mmengine_checkpoint, '_safe_torch_load'):
        mmengine_checkpoint._safe_torch_load = partial(torch.load, weights_only=True)


# -- loading them into models -------------------------------------------------


def _load_with_prefix(prefix: str, filename: str, map_location=None) -> State:
    """mmengine's loader of ``init_cfg`` with ``prefix``, keeping metadata."""
    checkpoint = mmengine_checkpoint._load_checkpoint(
        filename, map_location=map_location
    )
    state = checkpoint.get('state_dict', checkpoint)
    prefix = prefix if prefix.endswith('.') else f'{prefix}.'
    part = part_of_state(state, prefix)
    if not part:
        raise ValueError(f'{prefix} is not in the checkpoint {filename}')
    return part


_stock_load_state_dict = mmengine_checkpoint.load_state_dict


def _load_state_dict(module, state_dict, strict=False, logger=None):
    """mmengine's, of a state dict that is fitted to the model first."""
    state_dict = prepare_state_dict(module, state_dict)
    return _stock_load_state_dict(module, state_dict, strict, logger)


def extend_loading() -> None:
    """Let mmengine's loading go through :func:`.loading.prepare_state_dict`.

    And keep a state's metadata, which holds the dialect, where ``init_cfg``
    takes a part of it by ``prefix``.
    """
    mmengine_checkpoint.load_state_dict = _load_state_dict
    mmengine_checkpoint._load_checkpoint_with_prefix = _load_with_prefix


# -- configs ------------------------------------------------------------------


def offer_configs() -> None:
    """Let ``bcn_mm::FOLDER/NAME.py`` name the configs that come with bcn_mm.

    As ``mmdet::FOLDER/NAME.py`` does for mmdet's, in ``_base_`` and in
    ``mmengine.hub.get_config``, however bcn_mm was installed. In the fork of
    the stack, this makes mmengine find ``mmseg::`` too.
    """
    if 'bcn_mm' in MODULE2PACKAGE:
        return
    # a module's name: mmengine finds its folder, but not that of a
    # distribution which is installed as editable
    MODULE2PACKAGE['bcn_mm'] = 'bcn_mm.version'
    # not the distribution mmsegmentation, which is onedl-mmsegmentation there
    if importlib.util.find_spec('mmseg'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'
    find = Config._get_cfg_path
    # mmengine reads all metafiles of a package, every time
    find_in_package = functools.lru_cache(maxsize=None)(lambda path: find(path, ''))

    def find_config(path: str, filename: str) -> Tuple[str, Optional[str]]:
        """Without the scope 'bcn_mm', which mmengine would make up for it:
        everything here is registered in the root, and a config's pipeline is
        to be built in the scope of the config that uses it."""
        found, scope = find_in_package(path) if '::' in path else find(path, filename)
        return found, None if scope == 'bcn_mm' else scope

    Config._get_cfg_path = staticmethod(find_config)


# -- BatchNorm fused into standardized convolutions ---------------------------
#
# mmcv and torch scale the weight of the convolution before a BatchNorm. A
# standardized convolution would standardize the scaled weight again, or, in
# mmcv's fusion on the fly, not at all. So they are handed the plain
# convolution that it computes. (BCN is no BatchNorm to them, and stays; its
# own folding is that of the deployment.)


def extend_fusion() -> None:
    """Let mmcv and torch fuse standardized convolutions with BatchNorm.

    ``mmcv.cnn.fuse_conv_bn``, behind ``--fuse-conv-bn``; the
    ``efficient_conv_bn_eval`` of mmcv's ``ConvModule``; and
    ``torch.nn.utils.fuse_conv_bn_eval``. Other convolutions go the old way.
    """
    _replace(fusion, 'fuse_conv_bn_eval', _fuse_plain)
    try:
        # the name is that of a function too, which hides the module
        mmcv = import_module('mmcv.cnn.utils.fuse_conv_bn')
        bricks = import_module('mmcv.cnn.bricks.conv_module')
    except ImportError:
        return
    _replace(mmcv, '_fuse_conv_bn', _fuse_plain)
    if hasattr(bricks, 'efficient_conv_bn_eval_forward'):  # since 2.0.1
        _replace(bricks, 'efficient_conv_bn_eval_forward', _forward_plain)


def _replace(home, name: str, wrapper: Callable) -> None:
    """Wrap a function, once, wherever it was imported under its name."""
    stock = getattr(home, name)
    if hasattr(stock, '_bcn_mm'):
        return
    new = wraps(stock)(wrapper(stock))
    new._bcn_mm = True
    for module in list(sys.modules.values()):
        if getattr(module, '__dict__', {}).get(name) is stock:
            setattr(module, name, new)


def _fuse_plain(fuse: Callable) -> Callable:
    """A fusion of plain convolutions made one of standardized ones too."""

    def fuse_plain(conv, *args, **kwargs):
        if isinstance(conv, WS_CONVS):
            conv = _plain_conv_of(conv)
        return fuse(conv, *args, **kwargs)

    return fuse_plain


def _plain_conv_of(conv: nn.Module) -> nn.Module:
    """The plain convolution that a standardized one computes."""
    from .deploy import plain_conv  # few who import bcn_mm fuse

    plain = plain_conv(conv, conv.standardized_weight(), conv.bias)
    plain.weight.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        plain.bias.requires_grad_(conv.bias.requires_grad)
    take_hooks(plain, conv)
    return plain.train(conv.training)


def _forward_plain(forward: Callable) -> Callable:
    """As :func:`_fuse_plain`, for a fusion in each pass, with gradients."""

    def forward_plain(bn, conv, x):
        if isinstance(conv, WS_CONVS):
            conv = SimpleNamespace(
                weight=conv.standardized_weight(),
                bias=conv.bias,
                _conv_forward=conv._conv_forward,
            )
        return forward(bn, conv, x)

    return forward_plain
