"""Layers away from their start, and what they hold."""

import pytest
import torch
from mmdet.registry import MODELS

BATCH_STAGES = pytest.mark.parametrize('estimate', [True, False])


def estimates(layer):
    """A copy of a module's buffers."""
    return {k: v.clone() for k, v in layer.named_buffers()}


def same(a, b):
    """Whether two states are equal, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def randomize(layer):
    """Move every parameter and estimate away from its start."""
    with torch.no_grad():
        for name, p in layer.state_dict().items():
            if p.is_floating_point():
                p.copy_(
                    torch.rand_like(p) + 0.5 if 'var' in name else torch.randn_like(p)
                )
            else:
                p.fill_(7)
    return layer


def resnet(depth=18, norm_cfg=None, **kwargs):
    """mmdet's ResNet with few channels, and BCN unless told otherwise."""
    return MODELS.build(
        dict(
            type='mmdet.ResNet',
            depth=depth,
            base_channels=8,
            norm_cfg=norm_cfg or dict(type='BCN'),
            **kwargs,
        )
    )
