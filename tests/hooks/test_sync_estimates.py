"""What ranks validate with, and what is saved; ``test_average`` tests how."""

import glob
import itertools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook
from support.ranks import on_ranks
from support.sync_estimates import (
    ESTIMATES,
    Net,
    RecordEstimates,
    Score,
    assert_equal,
    batches,
    estimates_of,
    loader,
    make_runner,
)

from bcn_mm.hooks import sync_estimates
from bcn_mm.weights.unpickling import load_weights

LOOPS = {
    'epochs': dict(by_epoch=True, max_epochs=3, val_interval=1),
    'iterations': dict(by_epoch=False, max_iters=7, val_interval=3),
}
EPOCH, END = 3, dict(epochs=9, iterations=7)
EMAS = {
    'no EMA': None,
    'EMA': dict(momentum=0.4),
    'EMA of buffers': dict(momentum=0.4, update_buffers=True),
    'early': dict(momentum=0.2, update_buffers=True, priority='VERY_HIGH'),
    'late': dict(momentum=0.2, update_buffers=True, priority=75),
    'begun later': dict(momentum=0.4, update_buffers=True, begin_iter=4),
    'every second': dict(momentum=0.4, update_buffers=True, interval=2),
    'mean of buffers': dict(ema_type='StochasticWeightAverage', update_buffers=True),
}
CASES = list(itertools.product(LOOPS, EMAS, (True, False), (True, False)))


def work(rank, folder, loop, ema, by_epoch, last, steps=None, **kwargs):
    """A real run; what it holds at its end."""
    train_cfg = dict(LOOPS[loop])
    if steps:
        train_cfg['max_iters'] = steps
    record, hooks = RecordEstimates(), [dict(type='SyncEstimatesHook')]
    if EMAS[ema] is not None:
        hooks.append(dict(type='EMAHook', strict_load=last, **EMAS[ema]))
    runner = make_runner(
        Net(rank=rank),
        rank,
        folder,
        train_cfg,
        loader(batches(rank, EPOCH if loop == 'epochs' else END[loop])),
        record,
        *hooks,
        checkpoint=dict(
            type='CheckpointHook',
            interval=2,
            by_epoch=by_epoch,
            save_last=last,
            save_best='score',
            rule='greater',
        ),
        val_dataloader=loader(batches(rank, 1)),
        val_evaluator=Evaluator(Score()),
        val_cfg={},
        **kwargs,
    )
    with mock.patch.object(
        sync_estimates,
        'average_estimates',
        wraps=sync_estimates.average_estimates,
    ) as average:
        runner.train()
    model = runner.model.module
    copies = [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]
    return dict(
        steps=record.steps,
        validated=model.validated,
        averaged=average.call_count,
        model=model.state_dict(),
        copy=copies[0].state_dict() if copies else {},
    )


def run_case(rank, folder, *case):
    result = work(rank, folder, *case)
    dist.barrier()
    result['files'] = {}
    for path in glob.glob(f'{folder}/*.pth'):
        saved = load_weights(path)
        result['files'][os.path.basename(path)] = (
            saved['meta']['iter'],
            estimates_of(saved['state_dict']),
            estimates_of(saved.get('ema_state_dict', {}), 'module.'),
        )
    return result


def run_all(rank, world, folder):
    return [run_case(rank, f'{folder}/{i}', *case) for i, case in enumerate(CASES)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    ranks = on_ranks(2, run_all, str(tmp_path_factory.mktemp('runs')))
    return dict(zip(CASES, zip(*ranks)))


def double(state):
    return {name: value.double() for name, value in state.items()}


def mixture(states, passes):
    """The ranks' average, from the definition and in float64."""
    mean_of = {}
    for name in states[0]:
        layer, _, what = name.rpartition('.')
        n = torch.stack([p[f'{layer}.num_batches_tracked'] for p in passes])
        mean, var = (
            torch.stack([s[f'{layer}.{k}'] for s in states]) for k in ESTIMATES[:2]
        )
        weights = (n / n.sum()).view(-1, 1)
        centre = (weights * mean).sum(0)
        mean_of[name] = dict(
            running_mean=centre,
            running_var=(weights * (var + (mean - centre) ** 2)).sum(0),
            num_batches_tracked=n.mean().round(),
        )[what]
    return mean_of


class Expected:
    """What the model and its copy should hold, step by step."""

    def __init__(self, loop, ema, by_epoch, last):
        self.loop, self.by_epoch, self.last = loop, by_epoch, last
        self.ema = dict(
            dict(begin_iter=0, interval=1, update_buffers=False),
            **(EMAS[ema] or {}),
        )
        self.late = ema == 'late'
        self.updates = 0

    def events(self, t):
        """Averages after step t: at savings, then at epochs' ends, at
        validations."""
        end = t == END[self.loop]
        return (
            not self.by_epoch and (t % 2 == 0 or (self.last and end)),
            end if self.loop == 'iterations' else t % EPOCH == 0,
            end or t % 3 == 0,
        )

    def update(self, t, copy, source):
        """mmengine's, of one rank."""
        if t < self.ema['begin_iter']:
            return source
        steps, self.updates = self.updates, self.updates + 1
        if steps == 0 or not self.ema['update_buffers']:
            return source
        if steps % self.ema['interval']:
            return copy
        rate = self.ema.get('momentum', 1 / (steps // self.ema['interval'] + 1))
        return {
            k: v if k.endswith('tracked') else v + rate * (source[k] - v)
            for k, v in copy.items()
        }

    def average(self, sources, copies):
        return (
            [mixture(sources, sources)] * 2,
            [mixture(copies, sources)] * 2,
        )

    def run(self, steps):
        """After each step, and what comes with it: model's and copy's."""
        copies, states = [None, None], []
        for t, sources in enumerate(zip(*steps), 1):
            sources = [double(s) for s in sources]
            saves, *others = self.events(t)
            if self.late and saves:
                sources, copies = self.average(sources, sources if t == 1 else copies)
            updates = self.updates
            for i, source in enumerate(sources):
                self.updates = updates
                copies[i] = self.update(t, copies[i], source)
            if (saves and not self.late) or any(others):
                sources, copies = self.average(sources, copies)
            states.append((sources, list(copies)))
        return states


def assert_close(given, want):
    assert given.keys() == want.keys() and given
    for name, value in given.items():
        torch.testing.assert_close(
            value.double(), want[name], rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.mark.parametrize('loop, ema, by_epoch, last', CASES)
def test_saved_and_validated_are_the_averages(runs, loop, ema, by_epoch, last):
    ranks = runs[loop, ema, by_epoch, last]
    want = Expected(loop, ema, by_epoch, last)
    states = want.run([r['steps'] for r in ranks])
    # the ranks' own estimates, between averages, are far from each other
    apart = [double(r['steps'][1])['norm.running_mean'] for r in ranks]
    assert (apart[0] - apart[1]).abs().max() > 0.05
    of_copy = EMAS[ema] is not None and want.ema['update_buffers']

    events = [want.events(t) for t in range(1, END[loop] + 1)]
    times = [t for t, (*_, validates) in enumerate(events, 1) if validates]
    for rank in ranks:
        assert rank['averaged'] == sum(map(sum, events))
        assert len(rank['validated']) == len(times)
    for i, t in enumerate(times):
        sources, copies = states[t - 1]
        assert_equal(*(r['validated'][i] for r in ranks))
        assert_close(ranks[0]['validated'][i], (copies if of_copy else sources)[0])

    files = ranks[0]['files']
    assert sum(name.startswith('best_score') for name in files) == 1
    assert by_epoch or {'iter_2.pth', 'iter_4.pth', 'iter_6.pth'} < set(files)
    if last:
        assert END[loop] in [t for name, (t, *_) in files.items() if name[:4] != 'best']
    for t, state, other in files.values():
        sources, copies = states[t - 1]
        if EMAS[ema] is None:
            assert_close(state, sources[0])
            assert not other
        else:
            assert_close(state, copies[0])
            assert_close(other, sources[0])


def run_resumed(rank, world, folder):
    results = []
    for i, ema in enumerate(EMAS):
        case = ('iterations', ema, False, True)
        whole = work(rank, f'{folder}/{i}/whole', *case)
        parts = f'{folder}/{i}/parts'
        work(rank, parts, *case, steps=4)
        dist.barrier()
        resumed = work(rank, parts, *case, load_from=f'{parts}/iter_4.pth', resume=True)
        results.append((whole, resumed))
    return results


def test_resuming_goes_on_with_the_same_values(tmp_path):
    """The two runs end with the very same weights and estimates."""
    for ranks in zip(*on_ranks(2, run_resumed, str(tmp_path))):
        for whole, resumed in ranks:
            assert len(resumed['steps']) == 3
            assert_equal(resumed['model'], whole['model'])
            assert resumed['copy'].keys() == whole['copy'].keys()
            for name, value in whole['copy'].items():
                assert torch.equal(resumed['copy'][name], value), name
