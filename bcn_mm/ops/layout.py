"""How tensors lie in memory, and in which dtype their statistics are."""

from typing import Iterator, List, Optional, TypeVar

import torch
from torch import Tensor

#: What may be None does so in the result, what may not does not.
_T = TypeVar('_T', Tensor, Optional[Tensor])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_dtype(dtype: torch.dtype, *tensors: _T) -> List[_T]:
    """Tensors, or None, in a dtype; those that have it are not copied."""
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def dense(x: Tensor) -> Tensor:
    """Return ``x`` itself if contiguous or channels-last, else a copy."""
    if x.is_contiguous() or _is_channels_last(x):
        return x
    return x.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return False


def in_layout_of(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t`` in the layout of the dense tensor ``x``."""
    if x.is_contiguous():
        return t.contiguous()
    fmt = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return t.contiguous(memory_format=fmt)


def flat(x: Tensor) -> Tensor:
    """View a dense tensor as (N, C, L)."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def broadcast_rows(x: Tensor, *rows: Tensor) -> Iterator[Tensor]:
    """View (N, C) tensors so that they broadcast over ``x``."""
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    return (t.view(shape) for t in rows)
