"""Functions of tensors; imports torch only."""

from .batch_channel_norm import (
    batch_channel_norm,
    check_num_groups,
    default_num_groups,
)
from .estimates import STARTS, check_start
from .portable import (
    affine_group_norm,
    batch_affine,
    exporting,
    group_norm_by_axes,
)
from .recomputation import extend_checkpoint
from .weight_standardization import DIALECTS, check_dialect, standardize_weight

__all__ = [
    'DIALECTS',
    'STARTS',
    'affine_group_norm',
    'batch_affine',
    'batch_channel_norm',
    'check_dialect',
    'check_num_groups',
    'check_start',
    'default_num_groups',
    'exporting',
    'extend_checkpoint',
    'group_norm_by_axes',
    'standardize_weight',
]

# importing it is what makes activation checkpointing exact
extend_checkpoint()
