"""Norms that components build without asking their config."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from torch import nn

from bcn_mm import BCN, replace_norms
from bcn_mm.layers import is_replaceable


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.shared = nn.BatchNorm2d(8)
        self.more = nn.Sequential(self.shared, nn.GroupNorm(2, 8))
        self.other = nn.ModuleList([nn.LayerNorm(8), nn.InstanceNorm2d(8)])

    def forward(self, x):
        return self.more(self.shared(self.conv(x)))


def test_layers_that_are_no_batch_or_group_norm():
    kinds = {nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm}
    assert all(map(is_replaceable, kinds))
    for kind in (nn.LayerNorm, nn.InstanceNorm2d, nn.Conv2d, BCN, None):
        assert not is_replaceable(kind)


def test_replaces_in_place_and_nothing_else():
    block = Block().eval()
    others = [*block.other]
    assert replace_norms(block) is block
    assert isinstance(block.shared, BCN) and block.more[0] is block.shared
    assert isinstance(block.more[1], BCN) and block.more[1].num_groups == 2
    assert [*block.other] == others
    assert not block.shared.training
    block(torch.randn(1, 3, 4, 4)).sum().backward()
    again = list(block.modules())
    replace_norms(block)
    assert list(block.modules()) == again


def test_takes_over_what_batch_norm_learnt():
    norm = nn.BatchNorm2d(8)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    nn.init.normal_(norm.weight)
    layer = replace_norms(norm, dict(type='BCN', num_groups=2))
    want = BCN(8, 2)
    want.load_state_dict(norm.state_dict())
    for name, value in want.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    bare = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
    assert replace_norms(bare).running_mean.eq(0).all()


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_with_bcn_builds_the_component(device):
    cfg = dict(
        type='DilatedEncoder', in_channels=16, out_channels=16,
        block_mid_channels=8, num_residual_blocks=2, block_dilations=[2, 4],
    )  # fmt: skip
    with torch.device(device), DefaultScope.overwrite_default_scope('mmdet'):
        stock = MODELS.build(cfg)
        cfg.update(type='WithBCN', component=cfg['type'])
        neck = MODELS.build(dict(cfg, bcn_cfg=dict(type='BCN', momentum=0.2)))
    assert type(neck) is type(stock)
    replaced = 0
    for name, layer in stock.named_modules():
        own = neck.get_submodule(name)
        if is_replaceable(type(layer)):
            replaced += 1
            assert isinstance(own, BCN) and own.momentum == 0.2
            assert own.weight.device.type == device
        else:
            assert type(own) is type(layer)
    assert replaced == 8
    if device == 'cpu':
        neck.init_weights()
        (out,) = neck([torch.randn(1, 16, 6, 6)])
        out.sum().backward()
