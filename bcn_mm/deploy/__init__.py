"""Models for other runtimes: folding for inference, and export to ONNX."""

from .fold import (
    EXPORTERS,
    UNUSED,
    AffineGroupNorm,
    Deployed,
    Folding,
    export_onnx,
    fold,
    largest_difference,
    onnx_difference,
)

__all__ = [
    'EXPORTERS',
    'UNUSED',
    'AffineGroupNorm',
    'Deployed',
    'Folding',
    'export_onnx',
    'fold',
    'largest_difference',
    'onnx_difference',
]
