"""Export to ONNX, in standard operators."""

import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Dict, Iterable, Iterator, Tuple, Union

import torch
from torch import Tensor, nn

from .._files import replacing
from ..ops import group_norm_by_axes
from ..ops._compat import TORCH, tree_leaves
from .compare import largest_difference

if TYPE_CHECKING:
    from onnx import GraphProto

#: torch's exporters: the current one, of torch 2.6, and the older, which is much
#: faster. The first that this torch has is the default.
EXPORTERS = ('dynamo', 'trace') if TORCH >= (2, 6) else ('trace',)
#: The version of ONNX's operators; torch 2.1 writes those of 18 wrongly.
OPSET = 18 if TORCH >= (2, 6) else 17


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

    def forward(self, pictures: Tensor) -> Union[Tensor, Tuple[Tensor, ...]]:
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
    exporter: str = EXPORTERS[0],
    opset: int = OPSET,
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
            is much faster. Default: ``'dynamo'``, or the one that there is.
        opset (int): Of ONNX. Default: 18, before torch 2.6 17.

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
        options = dict(
            dynamo=True,
            external_data=False,
            dynamic_shapes=(dict.fromkeys(names, size),),
            verbose=False,
        )
    else:
        options = dict(dynamic_axes=dict(pictures=names))
        if 'dynamo' in EXPORTERS:
            options['dynamo'] = False
    with replacing(path) as draft:
        with torch.no_grad(), _exact_group_norms(model):
            outputs = len(tree_leaves(model(pictures)))
            torch.onnx.export(
                model,
                (pictures,),
                draft,
                input_names=['pictures'],
                output_names=[f'output_{i}' for i in range(outputs)],
                opset_version=opset,
                **options,
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
    return group_norm_by_axes(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _share_constants(graph: 'GraphProto') -> None:
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


def _tidy(graph: 'GraphProto', names: Dict[int, str]) -> None:
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
def onnx_difference(path: str, model: nn.Module, batches: Iterable[Tensor]) -> float:
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
