"""Having autograd keep recipes of a model's activations, instead of these."""

import logging
import sys
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.logging import print_log
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..ops import recomputation
from ..ops._compat import ALWAYS_CALL, module_call
from ..ops.recipes import ACTIVATIONS, ADDITIONS
from ..ops.rematerialization import Region, storage_of

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish)
# How many passes are looked at for activations that are no modules.
_WATCHED = 5
_CALL = module_call.__code__
_LOOKED_AT = {*ACTIVATIONS, *ADDITIONS}


def recompute_activations(model: nn.Module) -> 'RecomputedActivations':
    """Save memory: compute again in the backward pass what BCN makes cheap to.

    Autograd keeps the output of a norm and its activation, for the activation and
    for the convolution behind it, and a standardized weight for its convolution.
    Of a BCN both follow from what the layer keeps anyway, in one elementwise pass:
    ``y = act(A x + B)``. From the next forward pass of ``model`` on they are not
    kept, but computed again, to the same bits. That is so for outputs of
    :class:`~bcn_mm.layers.BCN`, with or without an activation (ReLU, ReLU6, LeakyReLU,
    SiLU, GELU, Hardswish; a module or a function, in place or not), for views of
    them, for their sums with what is kept anyway and activations of these (of the
    residual blocks of a stage two in three, so that no more than two sums are
    computed for one), and for the weights of :class:`~bcn_mm.layers.WSConv2d` in
    their own precision. Everything else is kept as ever, and so is what something
    else writes into.

    What ``torch.utils.checkpoint`` repeats keeps nothing, and goes on doing so. A
    model that ``torch.compile`` has compiled is left alone, with a warning. What takes
    no hooks of saved tensors (``torch.func.grad``, ``vjp``) raises within such a pass.

    Source: the layer's definition (:func:`bcn_mm.ops.batch_channel_norm`).

    Args:
        model (nn.Module): The network. This is about what its ``forward`` saves,
            or that of one of its children.

    Returns:
        RecomputedActivations: a handle whose ``remove()`` undoes this, and a
        context manager that does so at its end. Copies of the model recompute
        as long as the model does.

    Example:
        >>> from bcn_mm import BCN
        >>> conv = nn.Conv2d(8, 8, 3)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), BCN(8), nn.ReLU(), conv)
        >>> with recompute_activations(net):
        ...     net(torch.randn(1, 3, 9, 9)).sum().backward()
        >>> conv.weight.grad.shape
        torch.Size([8, 8, 3, 3])
    """
    return RecomputedActivations(model)


class RecomputedActivations:
    """What :func:`recompute_activations` returns.

    Attributes:
        is_active (bool): Whether the model recomputes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_active = not any(map(is_compiled, model.modules()))
        self._model = model
        self._region = Region()
        self._handles: List[RemovableHandle] = []
        self._owners: Dict[nn.Module, None] = {}
        if not self.is_active:
            print_log(
                'the activations of this model are not recomputed: torch.compile '
                'decides by itself what to keep',
                logger='current',
                level=logging.WARNING,
            )
            return
        for module in (model, *model.children()):
            self._hang(module, _Around(_Door(self).context))
        for module in model.modules():
            if isinstance(module, _ACTIVATIONS):
                self._own(module)

    def remove(self) -> None:
        """Have the model keep what it kept before, from the next pass on."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._owners = [], {}
        self.is_active = False
        _entered.leave_ended()

    def __enter__(self) -> 'RecomputedActivations':
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def measure(self, on: bool = True) -> Tuple[int, int]:
        """Add up what is saved for the backward pass, or stop doing so.

        Args:
            on (bool): Whether to, from now on. Default: True.

        Returns:
            tuple[int, int]: bytes that recipes stood for, and bytes of all other
            tensors but parameters that were saved, since the last call.
        """
        region = self._region
        own = {storage_of(p) for p in self._model.parameters()}
        kept = sum(n for storage, n in region.kept.items() if storage not in own)
        result = region.spared, kept
        region.counts, region.spared, region.kept = on, 0, {}
        return result

    def _hang(self, module: nn.Module, around: '_Around') -> None:
        self._handles += [
            module.register_forward_pre_hook(around.before),
            module.register_forward_hook(around.after, **ALWAYS_CALL),
        ]

    def _own(self, module: nn.Module) -> None:
        """Look at what a module computes for activations, from its next call on."""
        if module not in self._owners and self.is_active:
            self._owners[module] = None
            self._hang(module, _Around(self._activations))

    def _activations(self) -> Optional[ContextManager]:
        return _Activations(self._region) if self._region.is_open else None


class _Door:
    """Opens a handle's region, and looks for activations in its first passes."""

    def __init__(self, handle: RecomputedActivations) -> None:
        self.handle = handle
        self.passes = 0

    def context(self) -> Optional[ContextManager]:
        _entered.leave_ended()
        if not self.handle.is_active or not torch.is_grad_enabled():
            return None
        if recomputation.is_on():  # whose own hooks must be the innermost
            return None
        return self.recomputing()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        region = self.handle._region
        if not region.open():  # an outer one is
            yield
            return
        self.passes += 1
        try:
            if self.passes > _WATCHED:
                yield
            else:
                with _Activations(region, self.handle._own):
                    yield
        finally:
            region.close()


class _Activations(TorchFunctionMode):
    """Tells a region of the activations that are computed.

    Args:
        region (Region): Where outputs of norms are followed.
        found (callable, optional): Called with each module that applies one.
    """

    def __init__(
        self, region: Region, found: Optional[Callable[[nn.Module], None]] = None
    ) -> None:
        super().__init__()
        self.region = region
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # a tensor that is named is left alone
        if func not in _LOOKED_AT or not args:
            return func(*args, **kwargs)

        def compute() -> Any:
            return func(*args, **kwargs)

        if func in ACTIVATIONS:
            if self.region.find(args[0]) is not None:
                self._tell_owner()
                activation = ACTIVATIONS[func](*args[1:], **kwargs)
                return self.region.activate(args[0], activation, compute)
            return compute()
        plain = len(args) == 2 and not kwargs
        if plain and any(self.region.find(x) is not None for x in args):
            self._tell_owner()
            return self.region.add(*args, compute)
        return compute()

    def _tell_owner(self) -> None:
        if self.found is not None:
            owner = _innermost_module()
            if owner is not None:
                self.found(owner)


class _Around:
    """Hooks that put a context around a module's forward pass.

    Copies of the module share them, and pickles have some that do nothing.
    """

    def __init__(self, make: Callable[[], Optional[ContextManager]]) -> None:
        self.make = make

    def before(self, module: nn.Module, args: Any) -> None:
        context = self.make()
        if context is not None:
            context.__enter__()
            _entered.calls.append((_innermost_call(), self, context))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _entered.calls:
            return
        call = _innermost_call()
        for entry in reversed(_entered.calls):
            if entry[0] is call and entry[1] is self:
                _entered.calls.remove(entry)
                entry[2].__exit__(None, None, None)
                return

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_Around':
        return self

    def __reduce__(self) -> Tuple[Callable, Tuple[Any, ...]]:
        return type(self), (_no_context,)


class _Entered(threading.local):
    """What this thread is within: calls of modules, and the contexts around them."""

    def __init__(self) -> None:
        self.calls: List[Tuple[Optional[FrameType], _Around, ContextManager]] = []

    def leave_ended(self) -> None:
        """Leave what a call was within that ended without its hook.

        torch calls hooks after errors, but not after an interrupt from the keyboard
        (before 2.1 after neither).
        """
        while self.calls and _has_ended(self.calls[-1][0]):
            self.calls.pop()[2].__exit__(None, None, None)


_entered = _Entered()


def _has_ended(call: Optional[FrameType]) -> bool:
    if call is None:
        return True
    try:
        call.clear()
    except RuntimeError:  # it is running
        return False
    return True


def _no_context() -> None:
    return None


def _innermost_module() -> Optional[nn.Module]:
    """The module whose call is the innermost that is running."""
    call = _innermost_call()
    return None if call is None else call.f_locals['self']


def _innermost_call() -> Optional[FrameType]:
    """The frame of that call."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` hides what a module does."""
    if getattr(module, '_compiled_call_impl', None) is not None:
        return True
    # torch.compile(module) wraps forward, mmengine's compile=True train_step
    return any(
        hasattr(getattr(module, name, None), '_torchdynamo_orig_callable')
        for name in ('forward', 'train_step')
    )
