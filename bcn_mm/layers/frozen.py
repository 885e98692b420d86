"""Telling of norms that train without their parameters, once for a model.

mmdet's ``*-caffe`` configs have ``norm_cfg=dict(type='BN', requires_grad=False)``
for statistics that stay. A ``norm_cfg=dict(type='BCN')`` that is merged into it
keeps ``requires_grad=False``, and no affine parameter trains.
"""

import logging
import sys
from types import FrameType
from typing import Any, Optional, Tuple
from weakref import WeakKeyDictionary

import torch
from mmengine.logging import print_log
from torch import nn

from ..ops._compat import TORCH, is_dynamo_compiling

_TRAIN = nn.Module.train.__code__


class _Notice:
    """A hook before ``forward`` that the frozen norms of a model share.

    Only of norms that are frozen when they are put in training mode: others
    have none. It takes itself away with the first training pass that is not
    compiled, and says nothing of stages that are frozen as a whole, which are
    in evaluation mode by then, and of teachers, which run without gradients.
    """

    def __init__(self) -> None:
        self.given = False

    def __call__(self, layer: nn.Module, inputs: Tuple[Any, ...]) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        compiling = is_dynamo_compiling()
        if compiling and TORCH < (2, 6):  # which would leave the graph for it
            return
        if not compiling:
            forget(layer)
        if not any(p.requires_grad for p in layer.parameters()):
            self.give()

    def give(self) -> None:
        """Say it, the first time that this is called."""
        if self.given:
            return
        self.given = True
        print_log(
            'BCN: norms are in training mode, but their affine parameters do not '
            'train (requires_grad=False, which norm_cfg inherits in *-caffe '
            "configs): say norm_cfg=dict(type='BCN', requires_grad=True), or "
            "dict(_delete_=True, type='BCN'); a stage that is meant to be frozen "
            'belongs in eval() mode',
            logger='current',
            level=logging.WARNING,
        )

    # Called when a pass is compiled, and not part of what it is compiled to: as
    # torch.compiler.assume_constant_result has it, which imports the compiler.
    give._dynamo_marked_constant = True


#: The module whose train() was called -> the notice of its norms.
_notices: 'WeakKeyDictionary[nn.Module, _Notice]' = WeakKeyDictionary()


def watch(layer: nn.Module) -> None:
    """Have a frozen norm that is being put in training mode say so when it runs.

    To be called by the norm's ``train()``.
    """
    forget(layer)
    notice = _notices.setdefault(_model_of(layer), _Notice())
    if not notice.given:
        layer.register_forward_pre_hook(notice)


def forget(layer: nn.Module) -> None:
    """Undo :func:`watch`."""
    hooks = layer._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(hook, _Notice):
            del hooks[key]


def _model_of(layer: nn.Module) -> nn.Module:
    """The outermost module whose ``train()`` is running, else the layer."""
    model = layer
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _TRAIN:
            model = frame.f_locals['self']
        frame = frame.f_back
    return model
