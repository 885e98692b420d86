"""Functions of tensors; imports torch only."""

from .batch_channel_norm import (
    RecentEstimates,
    batch_channel_norm,
    check_num_groups,
    default_num_groups,
    inside_backward,
)
from .weight_standardization import DIALECTS, check_dialect, standardize_weight

__all__ = [
    'DIALECTS',
    'RecentEstimates',
    'batch_channel_norm',
    'check_dialect',
    'check_num_groups',
    'default_num_groups',
    'inside_backward',
    'standardize_weight',
]
