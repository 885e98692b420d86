"""The numbers are those of all ranks."""

import os

import torch
import torch.nn.functional as F
from support.ranks import on_ranks
from support.singularity import (
    CHANNELS,
    GLOO,
    NORMS,
    Broken,
    Kept,
    Scheduled,
    channels,
    check,
    images,
    train,
    warning_in,
)
from torch import nn

from bcn_mm import EliminationSingularityHook


def run_scheduled(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    results = []
    for seed in range(4):
        hook = EliminationSingularityHook(interval=4, window=4)
        body = Scheduled(seed, rank, steps=4)
        train(body, images(4, n=1 + rank), f'{folder}/{seed}', hook, **GLOO)
        layers = {
            name: {k: v for k, v in layer.items() if k in ('rate', 'margin')}
            for name, layer in hook.results['layers'].items()
        }
        results.append((layers, body.counting(range(4))))
    return results


def test_each_rank_sees_its_own(tmp_path):
    """A norm counts with the calls of those ranks on which it counts."""
    for ranks in zip(*on_ranks(2, run_scheduled, str(tmp_path))):
        calls = {}
        for _, own in ranks:
            for i, kept in own.items():
                calls.setdefault(f'body.norms.{i}', []).extend(kept)
        calls = {name: kept for name, kept in calls.items() if kept}
        for layers, _ in ranks:
            assert set(layers) == set(calls)
            for name, layer in layers.items():
                values = torch.cat([channels(y) for _, y in calls[name]], 1)
                rate = (values > 0).double().mean(1)
                margin = values.mean(1) / values.std(1, correction=0)
                close = dict(rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(layer['rate'], rate, **close)
                torch.testing.assert_close(layer['margin'], margin, **close)


WAYS_OF_RANKS = [
    ('nan', 'inf', 'were finite'),
    ('plain', 'nan', 'were finite'),
    ('nan', 'plain', 'were finite'),
    ('plain', 'plain', 'no norm has fed a ReLU'),
    ('fed', 'nan', ''),
    ('nan', 'fed', ''),
]


def run_broken(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    for i, ways in enumerate(WAYS_OF_RANKS):
        hook = EliminationSingularityHook(interval=1, window=1)
        body = Broken('GN', ways[rank])
        train(body, images(1), f'{folder}/{i}', hook, **GLOO)


def test_why_nothing_is_measured_on_ranks(tmp_path):
    on_ranks(2, run_broken, str(tmp_path))
    for i, (*_, want) in enumerate(WAYS_OF_RANKS):
        assert warning_in(tmp_path / f'{i}') == want


class OnRanks(nn.Module):
    """Rank 0 has nothing for the head until the last step."""

    def __init__(self, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.body = Kept(NORMS['BCN'])
        self.late = nn.GroupNorm(2, CHANNELS)
        self.rank, self.steps, self.kept = rank, 0, []

    def forward(self, x):
        self.steps += 1
        y = self.body(x)
        if self.rank == 0 and self.steps < 3:
            return y + sum(0 * p.sum() for p in self.late.parameters())
        z = self.late(self.body.conv(x))
        self.kept.append((torch.zeros(0), z.detach().clone()))
        return y + F.relu(z).mean()


def run_rank(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)  # as launchers do
    hook = EliminationSingularityHook(interval=3, window=3)
    body = OnRanks(rank)
    batches = [b + rank for b in images(3, n=1 + rank, size=6 + rank, scale=1 + rank)]
    runner = train(
        body,
        batches,
        folder,
        hook,
        **GLOO,
    )
    assert type(runner.model).__name__ == 'MMDistributedDataParallel'
    return dict(
        results=hook.results,
        kept=dict(
            body_norm=body.body.kept['norm'],
            body_head=body.body.kept['head'],
            late=body.kept,
        ),
        estimates=[
            (norm.running_mean, norm.running_var)
            for norm in (body.body.norm, body.body.head)
        ],
        history=len(hook.history),
    )


def test_numbers_are_those_of_all_ranks(tmp_path):
    ranks = on_ranks(2, run_rank, str(tmp_path))
    first, second = (rank['results'] for rank in ranks)
    layers = first['layers']
    assert sorted(layers) == ['body.body.head', 'body.body.norm', 'body.late']
    kept = [rank['kept'] for rank in ranks]
    for i, name in enumerate(('norm', 'head')):
        calls = kept[0][f'body_{name}'] + kept[1][f'body_{name}']
        mean, var = (
            torch.stack([rank['estimates'][i][k] for rank in ranks]).double()
            for k in (0, 1)
        )
        mixture = var.mean(0) + mean.var(0, correction=0)
        check(layers[f'body.body.{name}'], calls, [(mean.mean(0), mixture)])
    check(layers['body.late'], kept[0]['late'] + kept[1]['late'])
    # both ranks have them, the first one logs
    assert [rank['history'] for rank in ranks] == [1, 0]
    for name, layer in second['layers'].items():
        torch.testing.assert_close(layer, layers[name], rtol=0, atol=0)
    assert len(list(tmp_path.rglob('scalars.json'))) == 1
