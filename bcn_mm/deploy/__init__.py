"""Models for other runtimes: folding for inference, and export to ONNX.

:func:`fold` takes the batch stages and the standardization of weights out of
a model that is done with training; :func:`export_onnx` writes a model, folded
or not, for every runtime that reads ONNX. ``torch.jit.trace`` and
``torch.export.export`` take both as they are.
"""

from .compare import largest_difference
from .dataflow import UNUSED
from .fold import AffineGroupNorm, Folding, fold, plain_conv
from .onnx import EXPORTERS, OPSET, Deployed, export_onnx, onnx_difference

__all__ = [
    'EXPORTERS',
    'OPSET',
    'UNUSED',
    'AffineGroupNorm',
    'Deployed',
    'Folding',
    'export_onnx',
    'fold',
    'largest_difference',
    'onnx_difference',
    'plain_conv',
]
