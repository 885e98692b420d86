"""A BCN that pyramid levels share, and the layers that it stands for."""

import torch
from torch import nn

from bcn_mm import BCN

SIZES = (8, 4, 2, 1, 1)  # as of P3 to P7


def pyramid(sizes=SIZES, channels=6, n=2):
    """Levels whose means and scales differ."""
    return [
        torch.randn(n, channels, size, size + 1, dtype=torch.double) * 2**i + i
        for i, size in enumerate(sizes)
    ]


def separate(layer):
    """A plain BCN per level, with the affine parameters of ``layer``."""
    layers = []
    for _ in range(layer.num_levels):
        one = BCN(
            layer.num_features,
            layer.num_groups,
            eps=layer.eps,
            momentum=layer.momentum,
            estimate=layer.estimate,
        ).to(layer.weight)
        for name, p in layer.named_parameters():
            setattr(one, name, p)
        layers.append(one)
    return layers


def shared(**kwargs):
    layer = BCN(6, 2, num_levels=5, **{'momentum': 0.3, **kwargs}).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 4)
    return layer


def assert_equal_estimates(layer, layers):
    for name, value in layer.named_buffers():
        want = torch.stack([getattr(one, name) for one in layers])
        torch.testing.assert_close(value, want, rtol=0, atol=0)


class Head(nn.Module):
    """What passes the levels through shared layers, one of them nested."""

    def __init__(self, layer):
        super().__init__()
        self.block = nn.Sequential(nn.Identity(), layer)

    def forward(self, levels):
        outs = []
        for x in levels:
            if x is None:
                raise InterruptedError
            outs.append(self.block(x))
        return outs
