"""Norms of torch's, alone and in a module."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.shared = nn.BatchNorm2d(8)
        self.more = nn.Sequential(self.shared, nn.GroupNorm(2, 8))
        self.other = nn.ModuleList([nn.LayerNorm(8), nn.InstanceNorm2d(8)])

    def forward(self, x):
        return self.more(self.shared(self.conv(x)))


def batch_norm(kind, channels, **kwargs):
    """One that has learnt something."""
    norm = kind(channels, **kwargs).eval()
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(1e-4, 1.5)
    return norm
