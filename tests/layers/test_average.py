"""Averaging estimates over ranks (gloo), beside its definition in float64."""

import pytest
import torch
from support.ranks import on_ranks
from torch import nn

from bcn_mm import BCN, average_estimates

SEEDS = range(12)
# a channel far from 0 has a mean of so many standard deviations
SCALES = (0.0, 1.0, 1e3, 1e7)


def make(seed, rank, world):
    """Layers of many kinds, whose estimates and passes differ by rank.

    Of every model one layer has run on all ranks, one on some, one on none,
    and one on none although its estimates have moved: those of a teacher that
    averages its student's and leaves integers alone.
    """
    common = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(1000 + 10 * seed + rank)

    def integer(high, generator=common):
        return int(torch.randint(high, (), generator=generator))

    net = nn.Sequential()
    for used in ('all', 'some', 'none', 'moved'):
        dtype = (torch.float32, torch.float64)[integer(2)]
        layer = BCN(2 + integer(5), 1, num_levels=1 + integer(3), dtype=dtype)
        net.append(layer)
        who = integer(world)
        shape = layer.running_mean.shape
        centre = torch.randn(shape, generator=common)
        centre = centre * SCALES[integer(len(SCALES))]
        if used == 'none' or (used == 'some' and who == rank):
            continue
        layer.running_mean.copy_(centre + torch.randn(shape, generator=own))
        layer.running_var.copy_(torch.rand(shape, generator=own) + 1e-3)
        if used != 'moved':
            passes = layer.num_batches_tracked
            passes.copy_(1 + torch.randint(9999, passes.shape, generator=own))
    return net


def state(net):
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def run(rank, world):
    results = []
    for seed in SEEDS:
        net = make(seed, rank, world)
        states = [state(net)]
        for _ in range(2):
            average_estimates(net)
            states.append(state(net))
        results.append(states)
    return results


@pytest.fixture(scope='module', params=[2, 3])
def ranks(request):
    return on_ranks(request.param, run)


@pytest.mark.parametrize('seed', SEEDS)
def test_average_is_the_mixture(ranks, seed):
    before = [rank[seed][0] for rank in ranks]
    after = ranks[0][seed][1]
    for i, used in enumerate(('all', 'some', 'none', 'moved')):
        mean, var, passes = (
            torch.stack([b[f'{i}.{k}'] for b in before])
            for k in ('running_mean', 'running_var', 'num_batches_tracked')
        )
        close = dict(rtol=1e-6, atol=0)
        if mean.dtype == torch.float64:
            close = dict(rtol=1e-12, atol=0)
        assert (passes.sum(0) == 0).all() == (used in ('none', 'moved'))
        p = passes.double().unsqueeze(-1)
        p = (p / p.sum(0)).nan_to_num(1 / len(ranks))
        mean, var = mean.double(), var.double()
        # about the first rank's: what is subtracted is small and exact
        offset = (p * (mean - mean[0])).sum(0)
        var = (p * (var + (mean - mean[0] - offset) ** 2)).sum(0)
        for name, want in (('mean', mean[0] + offset), ('var', var)):
            given = after[f'{i}.running_{name}'].double()
            torch.testing.assert_close(given, want, **close)
        want = passes.double().mean(0).round()
        assert torch.equal(after[f'{i}.num_batches_tracked'].double(), want)
        if used == 'none':
            for k in ('running_mean', 'running_var'):
                assert torch.equal(after[f'{i}.{k}'], before[0][f'{i}.{k}'])


@pytest.mark.parametrize('seed', SEEDS)
def test_ranks_agree_and_stay_so(ranks, seed):
    """To the bit; in float64, whose products round, to the last one."""
    for name, once in ranks[0][seed][1].items():
        for rank in ranks[1:]:
            assert torch.equal(rank[seed][1][name], once), name
        twice = ranks[0][seed][2][name]
        if once.dtype == torch.float64:
            torch.testing.assert_close(twice, once, rtol=1e-15, atol=0)
        else:
            assert torch.equal(twice, once), name
