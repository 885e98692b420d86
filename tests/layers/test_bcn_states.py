"""Loading states: its own, and those of other layouts."""

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from support.layers import randomize, resnet, same
from torch import nn

from bcn_mm import BCN


def test_own_state_round_trip(log):
    source, layer = randomize(BCN(64)), BCN(64)
    layer.load_state_dict(source.state_dict())
    assert same(layer.state_dict(), source.state_dict()) and not log


@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_batch_norm_state_fills_the_batch_stage(loader, log):
    torch.manual_seed(3)
    bn = resnet(norm_cfg=dict(type='BN'))
    for m in bn.modules():
        if isinstance(m, nn.BatchNorm2d):
            randomize(m)
            m.num_batches_tracked.fill_(7)
    net = randomize(resnet())
    state = bn.state_dict()
    keys = list(state)
    for _ in range(2):
        log.clear()
        if loader == 'torch':
            result = net.load_state_dict(state)
            assert not result.missing_keys + result.unexpected_keys
        else:
            load_state_dict(net, state, strict=True)
        assert len(log) == 1 and 'BatchNorm' in log[0]
    assert list(state) == keys
    ours, theirs = net.layer2[0].bn2, bn.layer2[0].bn2
    assert torch.equal(ours.batch_weight, theirs.weight)
    assert torch.equal(ours.batch_bias, theirs.bias)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 7


def test_batch_norm_state_is_kept_by_a_channel_stage_in_the_mean():
    """Exactly where a sample has the statistics of what was trained on."""
    torch.manual_seed(5)
    groups, count = 4, 4096
    bn = randomize(nn.BatchNorm2d(32).double()).eval()
    with torch.no_grad():
        bn.weight[:8] = 0  # a group that BatchNorm has switched off
    layer = BCN(32, groups).double().eval()
    layer.load_state_dict(bn.state_dict())
    x = torch.randn(1, 32, count, 1, dtype=torch.double)
    var, mean = torch.var_mean(x, 2, unbiased=False, keepdim=True)
    x = (x - mean) / var.sqrt()  # mean 0 and variance 1, exactly
    x = x * (bn.running_var + bn.eps).sqrt().view(32, 1, 1)
    x = x + bn.running_mean.view(32, 1, 1)
    torch.testing.assert_close(layer(x), bn(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('inner', ['bn', 'pbn'])
@pytest.mark.parametrize('tracked', [True, False])
def test_authors_state(inner, tracked, log):
    layer, source = randomize(BCN(64)), randomize(BCN(64))
    state = {
        'n.weight': source.weight.view(1, 32, 1),
        'n.bias': source.bias.view(1, 32, 1),
        f'n.{inner}.weight': source.batch_weight,
        f'n.{inner}.bias': source.batch_bias,
        f'n.{inner}.running_mean': source.running_mean,
        f'n.{inner}.running_var': source.running_var,
    }
    if tracked:
        state[f'n.{inner}.num_batches_tracked'] = torch.tensor(7)
        state[f'n.{inner}.estbn_moving_speed'] = torch.zeros(1)
    else:  # as old as the default momentum's memory
        source.num_batches_tracked.fill_(100)
    nn.ModuleDict(dict(n=layer)).load_state_dict(state)
    assert same(layer.state_dict(), source.state_dict())
    assert len(log) == 1 and "authors'" in log[0]


@pytest.mark.parametrize('source', [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
@pytest.mark.parametrize('levels', [1, 3])
def test_a_foreign_state_that_is_assigned(source, levels):
    """All of a layer ends on the state's device, in memory of its own."""
    state = source(8).to('meta').state_dict()
    state.pop('num_batches_tracked', None)
    layer = BCN(8, num_levels=levels)
    layer.load_state_dict(state, assign=True)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {t.device.type for t in tensors} == {'meta'}
    state = {k: torch.ones_like(t, device='cpu') for k, t in state.items()}
    layer = BCN(8, num_levels=levels)
    layer.load_state_dict(state, assign=True)
    before = layer.running_mean.view(levels, 8).clone()
    layer(torch.randn(2, 8, 4, 4) + 5)  # moves the first level alone
    moved = layer.running_mean.view(levels, 8) != before
    assert moved.any(1).sum() == 1


@pytest.mark.parametrize(
    'source, message',
    [
        (nn.GroupNorm(32, 64, affine=False), 'running_mean'),
        (nn.GroupNorm(32, 32), r'Missing.*batch_weight'),
        (nn.LayerNorm([64, 2]), r'size mismatch for weight'),
        (nn.BatchNorm2d(32), r'size mismatch for batch_weight'),
        (BCN(64, num_groups=16), r'size mismatch for weight'),
    ],
)
def test_anything_else_is_a_mismatch(source, message):
    with pytest.raises(RuntimeError, match=message):
        BCN(64).load_state_dict(source.state_dict())


def test_leftovers_of_a_known_layout_are_reported():
    state = nn.BatchNorm2d(64).state_dict()
    with pytest.raises(RuntimeError, match='Unexpected.*surprise'):
        BCN(64).load_state_dict({**state, 'surprise': torch.zeros(1)})
