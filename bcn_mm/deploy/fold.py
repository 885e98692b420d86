"""Models for other runtimes: folding for inference, and export to ONNX.

:func:`fold` takes the batch stages and the standardization of weights out of
a model that is done with training; :func:`export_onnx` writes a model, folded
or not, for every runtime that reads ONNX. ``torch.jit.trace`` and
``torch.export.export`` take both as they are.
"""

import copy
import gc
import os
import re
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
)
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..layers import BCN, WSConv1d, WSConv2d, WSConv3d
from ..layers.levels import LevelCounter
from ..ops import affine_group_norm, batch_affine, group_norm_by_axes

_WS = (WSConv1d, WSConv2d, WSConv3d)
_PLAIN = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_CONVOLVE = {
    getattr(torch, f'conv{kind}{n}d')
    for kind in ('', '_transpose')
    for n in (1, 2, 3)
}
# what may be asked of a tensor without using its values
_METADATA = {
    *('size', 'dim', 'numel', 'stride', 'is_contiguous', 'get_device'),
    *('is_floating_point', 'is_complex', 'element_size', '__len__'),
    *(f'{name}.__get__' for name in (
        'shape', 'dtype', 'device', 'layout', 'ndim', 'is_cuda', 'is_sparse',
        'requires_grad', 'is_leaf', 'grad_fn', 'names', 'is_quantized',
    )),
}  # fmt: skip


EXPORTERS = ('dynamo', 'trace')
#: Why the batch stage of a norm stays that the watched pass did not use.
UNUSED = 'nothing passed through it'


class Folding(NamedTuple):
    """What :func:`fold` did with one layer.

    Attributes:
        norm (str, optional): The BCN; None for a convolution without one.
        conv (str, optional): The convolution that its batch stage went into,
            or that became a plain one; None if the batch stage stays.
        note (str): Why it stays.
    """

    norm: Optional[str]
    conv: Optional[str]
    note: str = ''


class AffineGroupNorm(nn.GroupNorm):
    """A BCN in evaluation mode whose batch stage could not be folded.

    ``y = GroupNorm(scale x + shift)``, everything per channel.

    Args:
        norm (BCN): What it stands for; with ``num_levels`` more than one,
            the levels are told apart as there.

    Shape:
        - Input: (N, C, *spatial) with 0 to 3 spatial dimensions.
        - Output: the shape of the input.

    Attributes:
        weight, bias: (C), or None without affine parameters.
        scale, shift: (C), or (num_levels, C).
    """

    def __init__(self, norm: BCN) -> None:
        super().__init__(
            norm.num_groups, norm.num_channels, norm.eps, norm.affine
        )
        many = norm.num_levels > 1
        self._levels = LevelCounter(norm.num_levels) if many else None
        dtype = norm.running_mean.dtype
        for name, value in zip(('scale', 'shift'), _batch_stage(norm)):
            self.register_buffer(name, value.to(dtype))
        _take_channel_stage(self, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        scale, shift = self.scale, self.shift
        if self._levels:
            level = self._levels.next(x)
            scale, shift = scale[level], shift[level]
        return affine_group_norm(
            x, self.num_groups, scale, shift, self.weight, self.bias, self.eps
        )


def _batch_stage(norm: BCN) -> Sequence[Tensor]:
    """Its scale and shift, in float64."""
    tensors = (
        norm.running_mean,
        norm.running_var,
        norm.batch_weight,
        norm.batch_bias,
    )
    return batch_affine(
        *(t if t is None else t.detach().double() for t in tensors), norm.eps
    )


def _take_channel_stage(group_norm: nn.GroupNorm, norm: BCN) -> None:
    """One affine pair per channel instead of one per group."""
    if norm.affine:
        repeats = norm.num_channels // norm.num_groups
        for name in ('weight', 'bias'):
            value = getattr(norm, name).detach().repeat_interleave(repeats)
            setattr(group_norm, name, _constant(value))
    group_norm.eval()


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class _Conv:
    """What a forward pass shows of one convolution."""

    def __init__(self, reason: str = '') -> None:
        self.reason = reason  # against folding
        self.sinks = set()  # the norms that its outputs go to
        self.weight = None  # that it convolves with
        self.call = None  # the running call: module's input, function calls
        self.calls = 0


class _Watch(TorchFunctionMode):
    """Follows the outputs of convolutions through forward passes.

    By the identity of tensors: every function of torch that is called with
    one, every module and every list that it is left in is seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.convs: Dict[nn.Module, _Conv] = {}
        self.sources: Dict[BCN, set] = defaultdict(set)
        self.origin = {}  # id of an output -> the convolution, a weak one
        self.active = []  # the convolutions and norms that are running
        self.handles = []
        for module in model.modules():
            if isinstance(module, BCN):
                begin, end = self.begin_norm, self.end_norm
            elif isinstance(module, _ConvNd):
                self.convs[module] = _Conv(_obstacle(module))
                begin, end = self.begin_conv, self.end_conv
            elif next(module.children(), None) is None and not isinstance(
                module, nn.Identity
            ):
                begin, end = self.use, None
            else:
                continue
            self.handles.append(
                module.register_forward_pre_hook(begin, with_kwargs=True)
            )
            if end:
                self.handles.append(module.register_forward_hook(end))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def conv_of(self, tensor: Any) -> Optional[nn.Module]:
        if not isinstance(tensor, Tensor):
            return None
        output, conv = self.origin.get(id(tensor), (lambda: None, None))
        return conv if output() is tensor else None

    def mark(self, values: Any, user: str) -> None:
        """The outputs of convolutions among ``values`` are used there too."""
        for value in tree_leaves(values):
            conv = self.conv_of(value)
            if conv is not None:
                self.convs[conv].reason = f'its output also goes to {user}'

    def use(self, module, args, kwargs) -> None:
        self.mark((args, kwargs), type(module).__name__)

    def begin_norm(self, module, args, kwargs) -> None:
        (x,) = (*args, *kwargs.values())
        conv = self.conv_of(x)
        self.sources[module].add(conv)
        if conv is not None:
            self.convs[conv].sinks.add(module)
        self.active.append(module)

    def end_norm(self, module, args, output) -> None:
        self.active.pop()

    def begin_conv(self, module, args, kwargs) -> None:
        self.use(module, args, kwargs)
        self.convs[module].call = next(iter((*args, *kwargs.values()))), []
        self.active.append(module)

    def end_conv(self, module, args, output) -> None:
        self.active.pop()
        seen = self.convs[module]
        (x, calls), seen.call = seen.call, None
        seen.calls += 1
        if len(calls) != 1 or calls[0][3] is not output:
            seen.reason = 'it is no single convolution'
            return
        given, weight, bias, _ = calls[0]
        if weight is not module.weight:
            plain = isinstance(module, _WS) or (
                given is x
                and module.padding_mode == 'zeros'
                and not isinstance(module, _ConvTransposeNd)
            )
            if not plain:
                seen.reason = 'it computes its weight from others'
            seen.weight = weight.detach()
        if bias is not module.bias:
            seen.reason = 'it computes its bias from others'
        self.origin[id(output)] = ref(output), module

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        running = self.active[-1] if self.active else None
        name = getattr(func, '__name__', '')
        if name == '__get__':
            name = f'{getattr(func.__self__, "__name__", "")}.__get__'
        if not isinstance(running, BCN) and name not in _METADATA:
            if func not in _CONVOLVE or running is None:
                self.mark((args, kwargs), f'{name}()')
            else:  # the module's input was marked
                result = func(*args, **kwargs)
                given = dict(zip(('input', 'weight', 'bias'), args)) | kwargs
                self.convs[running].call[1].append(
                    (
                        given['input'],
                        given['weight'],
                        given.get('bias'),
                        result,
                    )
                )
                return result
        return func(*args, **kwargs)

    def settle(self, output: Any) -> None:
        """Notice what left the pass or stays behind, ``output`` included."""
        self.mark(output, 'the output')
        gc.collect()
        for tensor, conv in self.origin.values():
            if tensor() is not None and not self.convs[conv].reason:
                self.convs[conv].reason = 'its output is kept somewhere'


def _obstacle(conv: nn.Module) -> str:
    """Why a convolution cannot be touched whatever its outputs are for."""
    if is_parametrized(conv):
        return 'it is parametrized'
    if conv._forward_hooks or conv._forward_pre_hooks:
        return 'it has hooks'
    return ''


def _partner(norm: BCN, watch: _Watch) -> Sequence[Any]:
    """The convolution that a norm folds into, or None and the reason."""
    sources = watch.sources.get(norm)
    if not sources:
        return None, UNUSED
    if norm._forward_pre_hooks:
        return None, 'it has hooks'
    if norm.num_levels > 1:
        return None, f'it has estimates for {norm.num_levels} levels'
    if norm.num_groups == norm.num_channels:
        return None, 'its groups have one channel'
    if None in sources:
        return None, 'its input is not, or not always, that of a convolution'
    if len(sources) > 1:
        return None, f'its input comes from {len(sources)} convolutions'
    (conv,) = sources
    seen = watch.convs[conv]
    if len(seen.sinks) > 1:
        return None, f'its convolution feeds {len(seen.sinks)} norms'
    if seen.reason:
        return None, f'its convolution: {seen.reason}'
    return conv, ''


@torch.no_grad()
def fold(
    model: nn.Module,
    *inputs: Any,
    run: Optional[Callable[..., Any]] = None,
    report: Optional[List[Folding]] = None,
) -> nn.Module:
    r"""Make a model for inference that has neither batch stages nor WS.

    In evaluation the batch stage is :math:`z = a x + b` per channel, with
    :math:`a = \gamma_b / \sqrt{\sigma^2 + \epsilon}` and :math:`b = \beta_b -
    \mu a`. Where ``x`` is the output of a convolution, a goes into its
    (standardized) weight and b into its bias, and what is left of the BCN is
    an ``nn.GroupNorm``. Every other standardized convolution becomes a plain
    one. The result equals the model up to rounding and has standard layers
    only, but for :class:`AffineGroupNorm`, see below.

    Which convolution comes before which norm is not guessed: one forward pass
    is watched, and the batch stage stays, as an explicit affine, unless in
    every call the norm's input was the very output of one convolution and
    nothing else saw that output. It also stays if the norm has estimates for
    several levels. So the pass has to be one that uses all of the model; a
    norm that nothing passed through keeps its batch stage. Another pass then
    compares the result with the model.

    Args:
        model (nn.Module): In evaluation mode; it is left as it is.
        *inputs: What a forward pass takes, a batch of pictures for instance.
        run (callable, optional): Makes that pass as ``run(model, *inputs)``.
            Default: ``model(*inputs)``.
        report (list, optional): Receives a :class:`Folding` per norm and per
            other standardized convolution.

    Returns:
        nn.Module: A folded copy of ``model``.

    Raises:
        ValueError: if a part of ``model`` is in training mode.
        RuntimeError: if the result differs from the model.

    Example:
        >>> model = nn.Sequential(WSConv2d(3, 8, 3), BCN(8)).eval()
        >>> fold(model, torch.randn(1, 3, 9, 9))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): GroupNorm(4, 8, eps=1e-05, affine=True)
        )
    """
    training = [n for n, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f'only models in evaluation mode can be folded, but '
            f'{training[0] or "the model"} is in training mode'
        )
    run = run or (lambda model, *inputs: model(*inputs))
    model, original = copy.deepcopy(model), model
    watch = _Watch(model)
    try:
        with watch:
            output = run(model, *inputs)
        watch.settle(output)
    finally:
        watch.remove()
    names = {m: name for name, m in model.named_modules()}
    new, found = {}, []
    for norm in (m for m in names if isinstance(m, BCN)):
        conv, reason = _partner(norm, watch)
        if conv is None:
            new[norm] = AffineGroupNorm(norm).eval()
            found.append(Folding(names[norm], None, reason))
            continue
        new[norm] = nn.GroupNorm(
            norm.num_groups, norm.num_channels, norm.eps, norm.affine
        )
        _take_channel_stage(new[norm], norm)
        new[conv] = _folded(conv, watch.convs[conv].weight, norm)
        found.append(Folding(names[norm], names[conv]))
    for conv in (m for m in names if isinstance(m, _WS) and m not in new):
        if not _obstacle(conv):
            new[conv] = _plain(conv, conv.standardized_weight(), conv.bias)
            found.append(Folding(None, names[conv]))
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in new:
                module._modules[name] = new[child]
    model = new.get(model, model)
    _check(output, run(model, *inputs), run(original, *inputs))
    if report is not None:
        report += found
    return model


def _folded(conv, weight: Optional[Tensor], norm: BCN) -> nn.Module:
    """A convolution that does a norm's batch stage too."""
    scale, shift = _batch_stage(norm)
    own = conv.weight.detach() if weight is None else weight
    if isinstance(conv, _ConvTransposeNd):  # (in, out / groups, *kernel)
        axis = (conv.groups, 1, -1) + (1,) * (own.dim() - 2)
        value = own.double().unflatten(0, (conv.groups, -1)) * scale.view(axis)
        value = value.flatten(0, 1)
    else:
        value = own.double() * scale.view(-1, *(1,) * (own.dim() - 1))
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    value, shift = (t.to(own.dtype) for t in (value, shift))
    if weight is not None:
        return _plain(conv, value, shift)
    conv = copy.copy(conv)  # what it shares with others stays theirs
    conv._parameters = dict(weight=_constant(value), bias=_constant(shift))
    return conv


def _plain(conv, weight: Tensor, bias: Optional[Tensor]) -> nn.Module:
    """A plain convolution with another weight and bias."""
    plain = _PLAIN[weight.dim()](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias is not None,
        conv.padding_mode,
        device='meta',
    )
    plain.weight = _constant(weight.detach().clone())
    if bias is not None:
        plain.bias = _constant(bias.detach().clone())
    return plain.eval()


def _check(watched, folded, original) -> None:
    """Make sure that nothing but rounding has changed."""
    watched, folded, original = (
        [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for out in (watched, folded, original)
    )
    floats = [t for t in original if t.is_floating_point()]
    if not floats:
        return
    allowed = max(torch.finfo(t.dtype).eps for t in floats) ** (1 / 3)
    for result in (watched, folded):
        difference = largest_difference(result, original)
        if not difference <= allowed:
            raise RuntimeError(
                f'the folded model differs from the model: by '
                f'{difference:.1g} of the largest value'
            )


def largest_difference(results: Any, references: Any) -> float:
    """The largest difference between tensors, relative to the largest value.

    Args:
        results (Any): A tensor, or tensors in lists, tuples and dicts.
        references (Any): As many, of the same shapes.

    Returns:
        float: the maximum over the tensors of ``max |result - reference| /
        max |reference|``; infinite where shapes differ or a value is not
        finite.
    """
    results, references = tree_leaves(results), tree_leaves(references)
    if len(results) != len(references):
        return float('inf')
    worst = 0.0
    for a, b in zip(results, references):
        if a.shape != b.shape:
            return float('inf')
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        difference = (a - b).abs().max() / b.abs().max().clamp_min(1e-30)
        if not difference.isfinite():
            return float('inf')
        worst = max(worst, difference.item())
    return worst


class Deployed(nn.Module):
    """The part of a detector, segmenter or classifier that is exported.

    It maps preprocessed pictures (normalized, padded) to what the model
    computes of them before anything depends on values: features of backbone
    and neck for mmdet, logits of the pictures' size for mmseg, logits or
    features for mmpretrain.

    Args:
        model (nn.Module): One of theirs, in evaluation mode.
        part (str): ``'model'``, or ``'backbone'`` for its backbone alone.

    Shape:
        - Input: (N, 3, H, W).
        - Output: a tensor, or a tuple of them.

    Raises:
        ValueError: if the model has no such part.
    """

    def __init__(self, model: nn.Module, part: str = 'model') -> None:
        super().__init__()
        if not hasattr(model, 'backbone'):
            raise ValueError(f'{type(model).__name__} has no backbone')
        self.kind = type(model).__module__.split('.')[0]
        if part == 'backbone':
            self.kind, model = part, model.backbone
        elif part != 'model':
            raise ValueError(f"part must be 'model' or 'backbone', not {part}")
        elif self.kind not in ('mmdet', 'mmseg', 'mmpretrain'):
            raise ValueError(
                f'{type(model).__name__} is of {self.kind}; only mmdet, mmseg '
                f'and mmpretrain models can be exported as a whole'
            )
        self.model = model
        self.training = False

    def forward(self, pictures: Tensor):
        """Compute the outputs."""
        if self.kind == 'backbone':
            output = self.model(pictures)
        elif self.kind == 'mmdet':
            output = self.model.extract_feat(pictures)
        else:
            output = self.model(pictures, mode='tensor')
        if self.kind == 'mmseg' and isinstance(output, Tensor):
            head = self.model.decode_head
            head = head[-1] if isinstance(head, nn.ModuleList) else head
            return nn.functional.interpolate(
                output,
                size=pictures.shape[2:],
                mode='bilinear',
                align_corners=head.align_corners,
            )
        return tuple(output) if isinstance(output, list) else output


def export_onnx(
    model: nn.Module,
    path: str,
    pictures: Tensor,
    exporter: str = 'dynamo',
    opset: int = 18,
) -> None:
    """Write a model as ONNX, in standard operators.

    Batch, height and width may vary. The file holds the weights; it is
    written beside its target and moved there.

    Args:
        model (nn.Module): In evaluation mode; takes one tensor and returns
            tensors, :class:`Deployed` for instance.
        path (str): The file to write.
        pictures (Tensor): (N, 3, H, W), an example; N must not be 1 for
            ``'dynamo'``.
        exporter (str): Which of torch's exporters: ``'dynamo'``, which needs
            onnxscript and torch 2.6, or ``'trace'``, the older one, which
            is much faster. Default: ``'dynamo'``.
        opset (int): Of ONNX. Default: 18.

    Raises:
        ValueError: if a part of the model is in training mode, or there is no
            such exporter.
        RuntimeError: if the exported model needs other operators.
    """
    import onnx

    if exporter not in EXPORTERS:
        raise ValueError(
            f'unknown exporter {exporter!r}; choose one of '
            f'{", ".join(map(repr, EXPORTERS))}'
        )
    if any(m.training for m in model.modules()):
        raise ValueError('only models in evaluation mode can be exported')
    names = {0: 'batch', 2: 'height', 3: 'width'}
    if exporter == 'dynamo':
        size = torch.export.Dim.DYNAMIC
        how = dict(
            dynamo=True,
            external_data=False,
            dynamic_shapes=(dict.fromkeys(names, size),),
            verbose=False,
        )
    else:
        how = dict(dynamo=False, dynamic_axes=dict(pictures=names))
    draft = f'{path}.part'
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with torch.no_grad(), _exact_group_norms(model):
            outputs = len(tree_leaves(model(pictures)))
            torch.onnx.export(
                model,
                (pictures,),
                draft,
                input_names=['pictures'],
                output_names=[f'output_{i}' for i in range(outputs)],
                opset_version=opset,
                **how,
            )
        proto = onnx.load(draft)
        _share_constants(proto.graph)
        _tidy(proto.graph, names)
        onnx.save(proto, draft)
        onnx.checker.check_model(draft, full_check=True)
        foreign = {n.domain for n in proto.graph.node} - {'', 'ai.onnx'}
        if foreign or proto.functions:
            raise RuntimeError(
                f'the exported model needs operators of {sorted(foreign)}'
            )
        os.replace(draft, path)
    finally:
        if os.path.exists(draft):
            os.remove(draft)


@contextmanager
def _exact_group_norms(model: nn.Module) -> Iterator[None]:
    """Have group norms that are exported take their means axis by axis."""
    norms = [m for m in model.modules() if type(m) is nn.GroupNorm]
    for norm in norms:
        norm.forward = partial(_exact_group_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _exact_group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm_by_axes(
        x, norm.num_groups, norm.weight, norm.bias, norm.eps
    )


def _share_constants(graph) -> None:
    """Take out the copies that stand for equal constants.

    torch's older exporter keeps one of them and puts an Identity in place of
    each other one, which onnxruntime's optimizer trips over (1.31: "Node input
    is not a graph input, initializer, or output of a previous node").

    Args:
        graph (onnx.GraphProto): Changed in place.
    """
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    if any(a.HasField('g') for node in graph.node for a in node.attribute):
        return  # a branch may use a copy by its name
    first, kept = {}, []
    for node in graph.node:
        given = [first.get(name, name) for name in node.input]
        if (
            node.op_type == 'Identity'
            and given[0] in constants
            and node.output[0] not in outputs
        ):
            first[node.output[0]] = given[0]
            continue
        node.input[:] = given
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _tidy(graph, names: Dict[int, str]) -> None:
    """Name the sizes, and take out where in whose source code all came from.

    Args:
        graph (onnx.GraphProto): Changed in place.
        names (dict): What to call the dimensions of the first input.
    """
    sizes = graph.input[0].type.tensor_type.shape.dim
    renamed = {sizes[i].dim_param: name for i, name in names.items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(
                    r'\w+',
                    lambda word: renamed.get(word[0], word[0]),
                    size.dim_param,
                )
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ''
    for tensor in graph.initializer:
        del tensor.metadata_props[:]


@torch.no_grad()
def onnx_difference(
    path: str, model: nn.Module, batches: Iterable[Tensor]
) -> float:
    """How far onnxruntime, on the CPU, is from PyTorch.

    Args:
        path (str): What :func:`export_onnx` wrote.
        model (nn.Module): What it was written from, or should equal.
        batches (Iterable[Tensor]): Each (N, 3, H, W).

    Returns:
        float: the maximum of :func:`largest_difference` over the batches.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider']
    )
    worst = 0.0
    for pictures in batches:
        results = session.run(None, {'pictures': pictures.cpu().numpy()})
        results = [torch.from_numpy(result) for result in results]
        expected = [t.cpu() for t in tree_leaves(model(pictures))]
        worst = max(worst, largest_difference(results, expected))
    return worst
