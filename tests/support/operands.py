"""What the op and its backends are tested with."""

import pytest
import torch

AFFINE = ('batch_weight', 'batch_bias', 'weight', 'bias')
MODES = [
    pytest.param(dict(training=t, estimate=e), id=f'{m}-{s}')
    for t, m in ((True, 'training'), (False, 'evaluation'))
    for e, s in ((True, 'estimate'), (False, 'batch'))
]


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    """...where torch knows such a layout, of 4 and 5 dimensions."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


LAYOUTS = [contiguous, channels_last]


def operands(channels, groups, dtype=torch.double):
    """Random statistics and affine parameters, none near a special value."""
    return dict(
        running_mean=torch.randn(channels, dtype=dtype),
        running_var=torch.rand(channels, dtype=dtype) + 0.5,
        batch_weight=torch.rand(channels, dtype=dtype) + 0.5,
        batch_bias=torch.randn(channels, dtype=dtype),
        weight=torch.rand(groups, dtype=dtype) + 0.5,
        bias=torch.randn(groups, dtype=dtype),
    )
