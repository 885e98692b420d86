"""Which convolutions' outputs go into which norms, seen in a forward pass."""

import gc
from collections import defaultdict
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from .._tracing import TensorTracer
from ..layers import BCN, WS_CONVS
from ..ops._compat import tree_leaves

#: Why the batch stage of a norm stays that the watched pass did not use.
UNUSED = 'nothing passed through it'

_CONVOLVE = {
    getattr(torch, f'conv{kind}{n}d') for kind in ('', '_transpose') for n in (1, 2, 3)
}
# what may be asked of a tensor without using its values
_METADATA = {
    *('size', 'dim', 'numel', 'stride', 'is_contiguous', 'get_device'),
    *('is_floating_point', 'is_complex', 'element_size', '__len__'),
    *(
        f'{name}.__get__'
        for name in (
            'shape',
            'dtype',
            'device',
            'layout',
            'ndim',
            'is_cuda',
            'is_sparse',
            'requires_grad',
            'is_leaf',
            'grad_fn',
            'names',
            'is_quantized',
        )
    ),
}


class _Call(NamedTuple):
    """A call of one of torch's functions for convolution."""

    input: Tensor
    weight: Tensor
    bias: Optional[Tensor]
    output: Tensor


class ConvRecord:
    """What a forward pass shows of one convolution.

    Attributes:
        obstacle (str): Why no norm can be folded into it; empty if one can.
        norms (set): Those that its outputs go into.
        weight (Tensor, optional): What it convolves with, if that is not its
            parameter.
    """

    def __init__(self, obstacle: str) -> None:
        self.obstacle = obstacle
        self.norms: Set[BCN] = set()
        self.weight: Optional[Tensor] = None
        # of the call that is running: its input, and the functions it called
        self.running: Optional[Tuple[Any, List[_Call]]] = None


class ConvTracer(TensorTracer):
    """Follows the outputs of convolutions through forward passes.

    Every function of torch that is called with one, every module and every
    list that it is left in is seen.

    Args:
        model (nn.Module): The model that runs within ``with tracer:``.

    Attributes:
        convs (dict): The :class:`ConvRecord` of every convolution.
        sources (dict): For every norm that ran, the set of what its inputs
            came from: convolutions, and None for anything else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # before the tracer's own hooks are there
        self.convs: Dict[nn.Module, ConvRecord] = {
            m: ConvRecord(obstacle_of(m))
            for m in model.modules()
            if isinstance(m, _ConvNd)
        }
        self.sources: Dict[BCN, Set[Optional[nn.Module]]] = defaultdict(set)
        self._running: List[nn.Module] = []  # convolutions and norms
        self._handles: List[RemovableHandle] = []

    def __enter__(self) -> 'ConvTracer':
        for module in self.model.modules():
            if isinstance(module, BCN):
                self._watch(module, self._begin_norm, self._end_norm)
            elif module in self.convs:
                self._watch(module, self._begin_conv, self._end_conv)
            elif next(module.children(), None) is None and not isinstance(
                module, nn.Identity
            ):
                self._watch(module, self._mark_inputs)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def finish(self, output: Any) -> None:
        """Notice what left the pass, as ``output``, or stays behind."""
        self._mark_used(output, 'the output')
        gc.collect()
        for conv in self.living():
            if not self.convs[conv].obstacle:
                self.convs[conv].obstacle = 'its output is kept somewhere'

    def source_of(self, norm: BCN) -> Tuple[Optional[nn.Module], str]:
        """The convolution that a norm can be folded into.

        Args:
            norm (BCN): One of the model's.

        Returns:
            tuple: the convolution and an empty string, or None and why there
            is no such convolution.
        """
        sources = self.sources.get(norm)
        if not sources:
            return None, UNUSED
        if norm._forward_pre_hooks or norm._forward_hooks:
            return None, 'it has hooks'
        if norm.num_levels > 1:
            return None, f'it has estimates for {norm.num_levels} levels'
        if norm.num_groups == norm.num_channels:
            return None, 'its groups have one channel'
        if None in sources:
            return (
                None,
                'its input is not, or not always, that of a convolution',
            )
        if len(sources) > 1:
            return None, f'its input comes from {len(sources)} convolutions'
        (conv,) = sources
        record = self.convs[conv]
        if len(record.norms) > 1:
            return None, f'its convolution feeds {len(record.norms)} norms'
        if record.obstacle:
            return None, f'its convolution: {record.obstacle}'
        return conv, ''

    def _watch(
        self,
        module: nn.Module,
        begin: Callable,
        end: Optional[Callable] = None,
    ) -> None:
        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        if end:
            self._handles.append(module.register_forward_hook(end))

    def _mark_used(self, values: Any, user: str) -> None:
        """The outputs of convolutions among ``values`` are used there too."""
        for value in tree_leaves(values):
            conv = self.label_of(value)
            if conv is not None:
                self.convs[conv].obstacle = f'its output also goes to {user}'

    def _mark_inputs(
        self, module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> None:
        self._mark_used((args, kwargs), type(module).__name__)

    def _begin_norm(
        self, module: BCN, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> None:
        (x,) = (*args, *kwargs.values())
        conv = self.label_of(x)
        self.sources[module].add(conv)
        if conv is not None:
            self.convs[conv].norms.add(module)
        self._running.append(module)

    def _end_norm(self, module: BCN, args: Tuple[Any, ...], output: Any) -> None:
        self._running.pop()

    def _begin_conv(
        self, module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> None:
        self._mark_inputs(module, args, kwargs)
        x = next(iter((*args, *kwargs.values())))
        self.convs[module].running = x, []
        self._running.append(module)

    def _end_conv(
        self, module: nn.Module, args: Tuple[Any, ...], output: Tensor
    ) -> None:
        self._running.pop()
        record = self.convs[module]
        (x, calls), record.running = record.running, None
        if len(calls) != 1 or calls[0].output is not output:
            record.obstacle = 'it is no single convolution'
            return
        (call,) = calls
        if call.weight is not module.weight:
            plain = isinstance(module, WS_CONVS) or (
                call.input is x
                and module.padding_mode == 'zeros'
                and not isinstance(module, _ConvTransposeNd)
            )
            if not plain:
                record.obstacle = 'it computes its weight from others'
            record.weight = call.weight.detach()
        if call.bias is not module.bias:
            record.obstacle = 'it computes its bias from others'
        self.follow(output, module)

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        running = self._running[-1] if self._running else None
        name = getattr(func, '__name__', '')
        if name == '__get__':
            name = f'{getattr(func.__self__, "__name__", "")}.__get__'
        if isinstance(running, BCN) or name in _METADATA:
            return func(*args, **kwargs)
        if func not in _CONVOLVE or running is None:
            self._mark_used((args, kwargs), f'{name}()')
            return func(*args, **kwargs)
        # the module's input was marked
        output = func(*args, **kwargs)
        given = {**dict(zip(('input', 'weight', 'bias'), args)), **kwargs}
        _, calls = self.convs[running].running
        calls.append(_Call(given['input'], given['weight'], given.get('bias'), output))
        return output


def obstacle_of(conv: nn.Module) -> str:
    """Why a convolution cannot be replaced, whatever its outputs are for.

    Args:
        conv (nn.Module): A convolution.

    Returns:
        str: empty if it can.
    """
    if is_parametrized(conv):
        return 'it is parametrized'
    if conv._forward_hooks or conv._forward_pre_hooks:
        return 'it has hooks'
    return ''
