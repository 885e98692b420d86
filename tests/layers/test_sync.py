"""BCN over several ranks (gloo): equal to one process with all samples."""

import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mmcv.cnn import build_norm_layer
from mmengine.model import revert_sync_batchnorm
from support import reference
from support.ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm import (
    BCN,
    SyncBCN,
    average_estimates,
    convert_sync_bcn,
    revert_sync_bcn,
)

CHANNELS, GROUPS, STEPS, MOMENTUM = 6, 3, 3, 0.1
# by rank: the number of samples and their size
BATCHES = {
    2: {
        'equal': [(2, 4, 5), (2, 4, 5)],
        'unequal batches': [(1, 4, 5), (3, 4, 5)],
        'unequal sizes': [(2, 4, 5), (1, 3, 7)],
        'empty rank': [(0, 4, 5), (2, 4, 5)],
        'empty size': [(2, 4, 5), (2, 0, 5)],
        'all empty': [(0, 4, 5), (0, 4, 5)],
        'one value': [(1, 1, 1), (1, 1, 1)],
    },
    3: {
        'unequal batches': [(1, 4, 5), (2, 4, 5), (4, 4, 5)],
        'unequal sizes': [(2, 4, 5), (0, 3, 7), (1, 1, 1)],
    },
}
CASES = [
    (world, name, estimate)
    for world, batches in BATCHES.items()
    for name, estimate in itertools.product(batches, (True, False))
]
AFFINE = ('batch_weight', 'batch_bias', 'weight', 'bias')
BUFFERS = ('running_mean', 'running_var')


def make_layer(estimate):
    torch.manual_seed(1)
    layer = SyncBCN(
        CHANNELS,
        GROUPS,
        momentum=MOMENTUM,
        estimate=estimate,
        dtype=torch.double,
    )
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return layer


def make_batches(shapes, step):
    """Inputs of all ranks, and the gradients of the loss to their outputs."""
    torch.manual_seed(step)
    return [
        (
            torch.randn(n, CHANNELS, *size, dtype=torch.double) * 3 + 20,
            torch.randn(n, CHANNELS, *size, dtype=torch.double),
        )
        for n, *size in shapes
    ]


def run_case(rank, world, name, estimate, recompute=False):
    layer = make_layer(estimate)
    result = dict(y=[], dx=[])
    for step in range(STEPS):
        x, dy = make_batches(BATCHES[world][name], step)[rank]
        x.requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.backward(dy)
        result['y'].append(y.detach())
        result['dx'].append(x.grad)
    result.update({k: getattr(layer, k).grad for k in AFFINE})
    result.update({k: getattr(layer, k) for k in BUFFERS})
    result['passes'] = int(layer.num_batches_tracked)
    return {k: v.detach() if torch.is_tensor(v) else v for k, v in result.items()}


def run_overflow(rank, world, estimate):
    """One rank has an infinite value in the second of three passes."""
    layer = make_layer(estimate)
    for step in range(3):
        x, _ = make_batches(BATCHES[world]['equal'], step)[rank]
        if step == 1 and rank == 1:
            x[0, 2, 0, 0] = float('inf')
        layer(x)
    return {k: getattr(layer, k).detach() for k in BUFFERS}


def run_average(rank, world):
    """Ranks see other data, and other numbers of batches; one layer none."""
    net = nn.Sequential(*(BCN(4, momentum=0.3) for _ in range(3)), BCN(4, num_levels=2))
    torch.manual_seed(rank)
    for _ in range(2 + rank):
        net[0](torch.randn(2, 4, 3, 3) + rank)
    if rank == 1:
        net[1](torch.randn(2, 4, 3, 3))
    for size in (4, 2, 4)[: 3 - rank]:  # the first rank misses a level
        net[3](torch.randn(2, 4, size, size) + size)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    average_estimates(net)
    return before, net.state_dict()


def run_group(rank, world):
    """Two groups of one rank each: no rank sees another."""
    groups = [dist.new_group([r]) for r in range(world)]
    layer = convert_sync_bcn(BCN(4), groups[rank])
    torch.manual_seed(rank)
    x = torch.randn(2, 4, 3, 3)
    alone = BCN(4)
    # an average of weights copies the layer, a checkpoint of it has no group
    twin = copy.deepcopy(layer)
    assert twin.process_group is layer.process_group is groups[rank]
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    assert torch.equal(twin(x), alone(x))
    alone = BCN(4)
    return bool(torch.equal(layer(x), alone(x)))


def run_counting(rank, world, estimate):
    """How many numbers each collective of a pass carries, either way."""
    carried, real = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        carried.append((tensor.numel(), tensor.element_size()))
        return real(tensor, *args, **kwargs)

    layer = make_layer(estimate)
    x, dy = make_batches(BATCHES[world]['equal'], 0)[rank]
    with mock.patch.object(dist, 'all_reduce', counting):
        y = layer(x.float().requires_grad_())
        forward = carried.copy()
        y.backward(dy.float())
        layer.eval()(x)
    return forward, carried[len(forward) :]


def run_start(rank, world):
    """A pass without values, then one far from zero, whose values are near."""
    layer = SyncBCN(CHANNELS, GROUPS, start='first')
    torch.manual_seed(0)
    x = torch.randn(world, CHANNELS, 8, 8) * 0.1 + 1000
    layer(x[:0])
    y = layer(x[rank : rank + 1])
    return x, y.detach(), {k: v.detach() for k, v in layer.named_buffers()}


def run_all(rank, world):
    results = {
        f'{name} {estimate}': run_case(rank, world, name, estimate)
        for name, estimate in itertools.product(BATCHES[world], (True, False))
    }
    if world == 2:
        for estimate in (True, False):
            results[f'recomputed {estimate}'] = run_case(
                rank, world, 'unequal batches', estimate, recompute=True
            )
            results[f'overflow {estimate}'] = run_overflow(rank, world, estimate)
            results[f'carried {estimate}'] = run_counting(rank, world, estimate)
        results['average'] = run_average(rank, world)
        results['group'] = run_group(rank, world)
        results['start'] = run_start(rank, world)
    return results


@pytest.fixture(scope='module')
def ranks():
    return {world: on_ranks(world, run_all) for world in BATCHES}


def expected(world, name, estimate):
    """One process with everybody's samples, by the plain definitions."""
    layer = make_layer(estimate)
    affine = [getattr(layer, k) for k in AFFINE]
    mean, var = layer.running_mean, layer.running_var
    result = dict(y=[], dx=[])
    for step in range(STEPS):
        batches = make_batches(BATCHES[world][name], step)
        xs = [x.requires_grad_() for x, _ in batches]
        some = [x for x in xs if x.numel()]
        mu, sigma2 = mean, var
        if some and estimate:
            with torch.no_grad():
                m = torch.cat([x.mean((2, 3)) for x in some])
                v = torch.cat([x.var((2, 3), correction=0) for x in some])
                s = (v + (m - mean) ** 2).mean(0)
                mean = mu = mean + MOMENTUM * (m.mean(0) - mean)
                var = sigma2 = var + MOMENTUM * (s - var)
        elif some:
            values = torch.cat([x.transpose(0, 1).flatten(1) for x in some], dim=1)
            mu, sigma2 = values.mean(1), values.var(1, correction=0)
            mean = (mean + MOMENTUM * (mu - mean)).detach()
            unbiased = values.var(1)
            var = (var + MOMENTUM * (unbiased - var)).detach()
        ys = [
            reference.bcn(
                x,
                GROUPS,
                mu,
                sigma2,
                *affine,
                training=False,
                estimate=True,
                momentum=0,
            )[0]
            if x.numel()
            else x * 1
            for x in xs
        ]
        loss = sum((y * dy).sum() for y, (_, dy) in zip(ys, batches))
        loss.backward()
        result['y'].append([y.detach() for y in ys])
        result['dx'].append([x.grad for x in xs])
    for k, p in zip(AFFINE, affine):
        result[k] = torch.zeros_like(p) if p.grad is None else p.grad
    return dict(result, running_mean=mean, running_var=var)


@pytest.mark.parametrize('world, name, estimate', CASES)
def test_is_one_process_with_all_samples(ranks, world, name, estimate):
    close = dict(rtol=1e-10, atol=1e-10)
    want = expected(world, name, estimate)
    given = [r[f'{name} {estimate}'] for r in ranks[world]]
    for step, k in itertools.product(range(STEPS), ('y', 'dx')):
        for rank, own in enumerate(given):
            torch.testing.assert_close(own[k][step], want[k][step][rank], **close)
    for k in AFFINE:
        torch.testing.assert_close(sum(r[k] for r in given), want[k], **close)
    for k, own in itertools.product(BUFFERS, given):
        torch.testing.assert_close(own[k], want[k], **close)
        assert torch.equal(own[k], given[0][k])


@pytest.mark.parametrize('estimate', [True, False])
def test_recomputation_moves_nothing(ranks, estimate):
    for own in ranks[2]:
        once = own[f'unequal batches {estimate}']
        again = own[f'recomputed {estimate}']
        assert again['passes'] == once['passes'] == STEPS
        for k, v in once.items():
            torch.testing.assert_close(again[k], v)


@pytest.mark.parametrize('estimate', [True, False])
def test_an_overflow_poisons_nobody(ranks, estimate):
    first, second = (r[f'overflow {estimate}'] for r in ranks[2])
    for k in BUFFERS:
        assert first[k].isfinite().all()
        assert torch.equal(first[k], second[k])


@pytest.mark.parametrize('estimate', [True, False])
def test_one_small_message_a_pass(ranks, estimate):
    forward, backward = ranks[2][0][f'carried {estimate}']
    assert forward == [(2 * CHANNELS + 1, 8)]
    assert backward == ([] if estimate else [(2 * CHANNELS, 4)])


def test_average_estimates(ranks):
    (before0, after0), (before1, after1) = (r['average'] for r in ranks[2])
    assert all(torch.equal(after0[k], after1[k]) for k in after0)
    n0, n1 = 2, 3
    for layer, weights in (('0', (n0, n1)), ('1', (0, 1)), ('2', (1, 1))):
        means = [b[f'{layer}.running_mean'] for b in (before0, before1)]
        variances = [b[f'{layer}.running_var'] for b in (before0, before1)]
        # moments of the mixture of the ranks' distributions
        p = torch.tensor(weights).float().view(2, 1) / sum(weights)
        mean = (p * torch.stack(means)).sum(0)
        second = torch.stack(variances) + torch.stack(means) ** 2
        var = (p * second).sum(0) - mean**2
        torch.testing.assert_close(after0[f'{layer}.running_mean'], mean)
        torch.testing.assert_close(after0[f'{layer}.running_var'], var)
    assert after0['0.num_batches_tracked'] == 2  # 2.5 to even
    # levels, each for itself: two passes and one on one rank, one and one
    for level, weights in enumerate(((2, 1), (1, 1))):
        means = [b['3.running_mean'][level] for b in (before0, before1)]
        want = sum(w * m for w, m in zip(weights, means)) / sum(weights)
        torch.testing.assert_close(after0['3.running_mean'][level], want)


def test_start_with_the_first_values(ranks):
    for x, y, buffers in (r['start'] for r in ranks[2]):
        assert buffers['num_batches_tracked'] == 1
        across = x.double().transpose(0, 1).flatten(1)
        var = across.var(1, correction=0).float()
        torch.testing.assert_close(buffers['running_var'], var, rtol=1e-2, atol=0)
        assert y.isfinite().all()


def test_process_group(ranks):
    assert all(r['group'] for r in ranks[2])


def test_one_process_is_plain_bcn():
    x = torch.randn(2, 8, 4, 4)
    plain = BCN(8)
    synced = build_norm_layer(dict(type='SyncBCN'), 8)[1]
    assert isinstance(synced, BCN) and synced.sync
    assert torch.equal(plain(x), synced(x))
    before = copy.deepcopy(plain.state_dict())
    average_estimates(plain)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


def test_conversions():
    net = nn.Sequential(BCN(4), nn.BatchNorm2d(4), SyncBCN(4))
    assert [m.sync for m in net if isinstance(m, BCN)] == [False, True]
    assert convert_sync_bcn(net) is net and net[0].sync
    assert revert_sync_bcn(net) is net
    assert not net[0].sync and not net[2].sync
    # torch's and mmengine's own conversions leave it alone
    torch_sync = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(torch_sync[0]) is BCN and type(torch_sync[2]) is SyncBCN
    assert type(torch_sync[1]) is nn.SyncBatchNorm
    back = revert_sync_batchnorm(torch_sync)
    assert type(back[0]) is BCN and type(back[2]) is SyncBCN
