"""What ranks validate with, and what is saved; ``test_average`` tests how."""

import glob
import itertools
import os
import uuid
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from support.ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bcn_mm import BCN, SyncBCN, SyncEstimatesHook
from bcn_mm.hooks import sync_estimates

ESTIMATES = ('running_mean', 'running_var', 'num_batches_tracked')


def estimates_of(state, prefix=''):
    """Of a state dict, copied and with bare names."""
    return {
        name[len(prefix) :]: value.clone()
        for name, value in state.items()
        if name.startswith(prefix) and name.endswith(ESTIMATES)
    }


class Net(BaseModel):
    """One layer runs in every step; one on rank 0 in every second only."""

    def __init__(self, make=BCN, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm, self.odd = make(4, momentum=0.3), make(4, momentum=0.3)
        self.rank, self.steps, self.validated = rank, 0, []

    def forward(self, inputs, mode='tensor'):
        x = self.norm(self.conv(inputs))
        if mode == 'predict':
            self.validated.append(estimates_of(self.state_dict()))
            return [0]
        self.steps += 1
        loss = x.square().mean()
        if self.rank or self.steps % 2:
            x = self.odd(x + self.rank)
        return dict(loss=loss + (x - 1).square().mean())

    def val_step(self, data):
        return self(**data, mode='predict')


class Score(BaseMetric):
    """The second validation is the best one."""

    scores = (1.0, 3.0, 2.0)

    def __init__(self):
        super().__init__()
        self.runs = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.runs += 1
        return dict(score=self.scores[(self.runs - 1) % 3])


class Look(Hook):
    """Keeps a model's own estimates as each step leaves them."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps = []

    def after_train_iter(self, runner, *args, **kwargs):
        model = getattr(runner.model, 'module', runner.model)
        self.steps.append(estimates_of(model.state_dict()))


def batches(rank, steps):
    generator = torch.Generator().manual_seed(1000 * rank)
    return [
        dict(
            inputs=torch.randn(1 + rank, 3, 6, 6, generator=generator) * (1 + 2 * rank)
            + rank
        )
        for _ in range(steps)
    ]


def loader(data):
    return DataLoader(data, collate_fn=lambda batch: batch[0])


def make_runner(model, rank, folder, train_cfg, data, *hooks, **kwargs):
    os.environ['LOCAL_RANK'] = str(rank)  # as launchers do
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=kwargs.pop('broadcast_buffers', False),
        find_unused_parameters=True,
    )
    checkpoint = kwargs.pop('checkpoint', None)
    return Runner(
        model,
        work_dir=folder,
        train_dataloader=data,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=train_cfg,
        default_hooks=dict(checkpoint=checkpoint),
        custom_hooks=list(hooks),
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
        experiment_name=uuid.uuid4().hex,
        **kwargs,
    )


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
    look, hooks = Look(), [dict(type='SyncEstimatesHook')]
    if EMAS[ema] is not None:
        hooks.append(dict(type='EMAHook', strict_load=last, **EMAS[ema]))
    runner = make_runner(
        Net(rank=rank),
        rank,
        folder,
        train_cfg,
        loader(batches(rank, EPOCH if loop == 'epochs' else END[loop])),
        look,
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
        steps=look.steps,
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
        saved = torch.load(path, weights_only=True)
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


def close(given, want):
    assert given.keys() == want.keys() and given
    for name, value in given.items():
        torch.testing.assert_close(
            value.double(), want[name], rtol=1e-5, atol=1e-6, msg=name
        )


def equal(first, second):
    assert first.keys() == second.keys() and first
    assert all(torch.equal(v, second[k]) for k, v in first.items())


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
        equal(*(r['validated'][i] for r in ranks))
        close(ranks[0]['validated'][i], (copies if of_copy else sources)[0])

    files = ranks[0]['files']
    assert sum(name.startswith('best_score') for name in files) == 1
    assert by_epoch or {'iter_2.pth', 'iter_4.pth', 'iter_6.pth'} < set(files)
    if last:
        assert END[loop] in [t for name, (t, *_) in files.items() if name[:4] != 'best']
    for t, state, other in files.values():
        sources, copies = states[t - 1]
        if EMAS[ema] is None:
            close(state, sources[0])
            assert not other
        else:
            close(state, copies[0])
            close(other, sources[0])


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
            equal(resumed['model'], whole['model'])
            assert resumed['copy'].keys() == whole['copy'].keys()
            for name, value in whole['copy'].items():
                assert torch.equal(resumed['copy'][name], value), name


WRAPPED = [
    (BCN, True, 1),
    (BCN, False, 0),
    (SyncBCN, True, 0),
    (lambda c, momentum: nn.GroupNorm(2, c), True, 0),
]


def run_wrapped(rank, world, folder):
    for i, (make, broadcast, _) in enumerate(WRAPPED):
        make_runner(
            Net(make, rank=1),  # SyncBCN needs all ranks in every pass
            rank,
            f'{folder}/{i}',
            dict(by_epoch=True, max_epochs=2),
            loader(batches(rank, 2)),
            dict(type='SyncEstimatesHook'),
            broadcast_buffers=broadcast,
        ).train()


def test_broadcast_buffers_are_named_once(tmp_path):
    """DDP would overwrite all estimates but the first rank's."""
    on_ranks(2, run_wrapped, str(tmp_path))
    for i, (_, _, count) in enumerate(WRAPPED):
        logs = [p.read_text() for p in (tmp_path / f'{i}').rglob('*.log')]
        text = ''.join(logs)
        assert 'Epoch(train)' in text
        assert text.count('model_wrapper_cfg.broadcast_buffers=False') == count


class Endless(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return itertools.cycle(self.data)


# by rank: the number of batches, and who has the fewest, if anybody
LENGTHS = {
    2: [([4, 3], 1), ([3, 3], None), (None, None)],
    3: [([2, 3, 3], 0), ([2, 2, 2], None)],
}


def run_uneven(rank, world, folder):
    messages = []
    for lengths, _ in LENGTHS[world]:
        data = batches(rank, lengths[rank]) if lengths else Endless([0])
        cfg = dict(by_epoch=False, max_iters=2)  # the loop that takes either
        runner = make_runner(Net(rank=rank), rank, folder, cfg, loader(data))
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        try:
            SyncEstimatesHook().before_train(runner)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize('world', LENGTHS)
def test_uneven_ranks_are_refused(world, tmp_path):
    for messages in on_ranks(world, run_uneven, str(tmp_path)):
        for (lengths, few), message in zip(LENGTHS[world], messages):
            assert (message is None) == (few is None)
            if message:
                assert f'wait for rank {few} forever' in message
                assert f'({lengths})' in message


def test_one_process_is_left_alone(tmp_path):
    """With and without the hook, to the bit, beside a copy of its own."""
    states = []
    for hooks in ([], [dict(type='SyncEstimatesHook')]):
        ema = EMAHook(update_buffers=True, momentum=0.4)
        model = Net()
        Runner(
            model,
            work_dir=str(tmp_path),
            train_dataloader=loader(batches(0, 3)),
            val_dataloader=loader(batches(0, 1)),
            val_evaluator=Evaluator(Score()),
            val_cfg={},
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            custom_hooks=[ema, *hooks],
            experiment_name=uuid.uuid4().hex,
        ).train()
        states.append({**model.state_dict(), **ema.ema_model.state_dict()})
    equal(*states)
