"""What a batch of another size does to rates, and to what counts batches."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn

from bcn_mm.convert.context import Context
from bcn_mm.convert.rates import scale_batch_size

STEPS = 120


def scaled(batch_size, keep_epochs=False, base=None, **settings):
    """A config with these settings at another batch size, and what was said."""
    loader = dict(batch_size=settings.pop('before', 4))
    stock = Config(dict(train_dataloader=loader, **settings))
    if base is not None:
        stock.auto_scale_lr = dict(base_batch_size=base)
    cfg = copy.deepcopy(stock)
    context = Context(MODELS, ConfigDict(type='BCN'))
    scale_batch_size(context, cfg, batch_size, keep_epochs)
    return stock, cfg, context.changes


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class OneOfEach:
    """An optimizer for each child of a model."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.cfg = optim_wrapper_cfg

    def __call__(self, model):
        return OptimWrapperDict(
            **{
                k: build_optim_wrapper(model.get_submodule(k), c)
                for k, c in self.cfg.items()
            }
        )


def net():
    return nn.ModuleDict(
        dict(
            generator=nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)),
            discriminator=nn.Linear(2, 1),
        )
    )


def rates(cfg, steps=STEPS):
    """The rate of every parameter group before each step and after the last."""
    wrapper = build_optim_wrapper(net(), cfg.optim_wrapper)
    several = isinstance(wrapper, OptimWrapperDict)
    schedulers = []
    for name, one in wrapper.items() if several else [('', wrapper)]:
        own = cfg.param_scheduler
        if isinstance(own, dict) and 'type' not in own:
            own = own[name]
        for scheduler in own if isinstance(own, list) else [own]:
            args = dict(optimizer=one)
            schedulers.append(PARAM_SCHEDULERS.build(scheduler, default_args=args))
    seen = []
    for _ in range(steps + 1):
        groups = (
            [g for w in wrapper.values() for g in w.optimizer.param_groups]
            if several
            else wrapper.optimizer.param_groups
        )
        seen.append([group['lr'] for group in groups])
        wrapper.step() if not several else [w.step() for w in wrapper.values()]
        for scheduler in schedulers:
            scheduler.step()
    return seen


def sgd(lr=0.02):
    return dict(type='SGD', lr=lr, momentum=0.9)


WARMUP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50)
STEP = dict(type='MultiStepLR', by_epoch=False, milestones=[80, 110], end=STEPS)
POLY = dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False, end=STEPS)
ONE_CYCLE = dict(type='OneCycleLR', eta_max=0.3, total_steps=STEPS + 1, by_epoch=False)
COSINE = dict(
    type='CosineAnnealingLR', eta_min=1e-5, begin=50, T_max=70, by_epoch=False
)
RATES = {
    'sgd': (dict(optimizer=sgd()), [WARMUP, STEP]),
    'adamw': (dict(optimizer=dict(type='AdamW', lr=1e-4)), [WARMUP, COSINE]),
    'by default': (dict(optimizer=dict(type='AdamW')), [WARMUP, STEP]),
    'paramwise': (
        dict(
            optimizer=sgd(),
            paramwise_cfg=dict(
                bias_lr_mult=2.0,
                custom_keys={
                    'generator.1': dict(lr_mult=0.1),
                    'discriminator.weight': dict(lr=0.5),
                },
            ),
        ),
        [WARMUP, STEP],
    ),
    'several': (
        dict(
            constructor='OneOfEach',
            generator=dict(optimizer=sgd()),
            discriminator=dict(optimizer=dict(type='Adam', lr=1e-3)),
        ),
        dict(generator=[WARMUP, POLY], discriminator=POLY),
    ),
    'several, one schedule': (
        dict(
            constructor='OneOfEach',
            generator=dict(optimizer=sgd()),
            discriminator=dict(optimizer=sgd(0.1)),
        ),
        [WARMUP, POLY],
    ),
    'one cycle': (dict(optimizer=sgd()), ONE_CYCLE),
    'poly': (dict(optimizer=sgd()), [WARMUP, POLY]),
    'any parameter': (
        dict(optimizer=sgd()),
        dict(POLY, type='PolyParamScheduler', param_name='lr'),
    ),
    'restarts': (
        dict(optimizer=sgd()),
        dict(
            type='CosineRestartLR',
            periods=[60, 61],
            restart_weights=[1, 0.5],
            eta_min=1e-3,
            by_epoch=False,
        ),
    ),
}


@pytest.mark.parametrize('batch_size', [1, 3, 16])
@pytest.mark.parametrize('kind', RATES)
def test_every_rate_is_scaled(kind, batch_size):
    wrapper, schedulers = RATES[kind]
    stock, cfg, _ = scaled(
        batch_size, optim_wrapper=wrapper, param_scheduler=schedulers
    )
    want, got = rates(stock), rates(cfg)
    for step in (0, 1, 100, STEPS):
        factor = batch_size / 4
        assert got[step] == pytest.approx([r * factor for r in want[step]], rel=1e-9)
    assert len({tuple(r) for r in want}) > 20  # it is a schedule


@pytest.mark.parametrize('kind', ['sgd', 'adamw', 'one cycle', 'poly', 'restarts'])
def test_stretched_schedule(kind):
    """After as many pictures, the rate is the stock one times the factor."""
    wrapper, schedulers = RATES[kind]
    settings = dict(optim_wrapper=wrapper, param_scheduler=schedulers)
    stock, cfg, _ = scaled(2, keep_epochs=True, **settings)
    want, got = rates(stock), rates(cfg, 2 * STEPS)
    most = max(max(row) for row in want)
    for step in range(STEPS):
        # the rate of one step may be shared by two
        near = [got[i][0] for i in (2 * step, 2 * step + 1)]
        error = min(abs(r - want[step][0] / 2) for r in near)
        assert error < 0.02 * most, step


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.net.discriminator(inputs).mean())


class Record(Hook):
    def __init__(self):
        self.rates = []

    def before_train_iter(self, runner, *args, **kwargs):
        groups = runner.optim_wrapper.optimizer.param_groups
        self.rates.append([group['lr'] for group in groups])


def test_rates_of_a_running_training(tmp_path, monkeypatch):
    """With --auto-scale-lr at the same real batch, the rates are the same."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    wrapper, schedulers = RATES['paramwise']
    stock, cfg, _ = scaled(
        1, before=4, base=2, optim_wrapper=wrapper, param_scheduler=schedulers
    )
    seen = {}
    for factor, config in ((1, stock), (4, cfg)):
        for batch_size in (1, 2):
            record = Record()
            name = f'{factor}_{batch_size}'
            Runner(
                Net(),
                str(tmp_path / name),
                train_dataloader=dict(
                    batch_size=batch_size,
                    dataset=list(torch.randn(16, 2)),
                    sampler=dict(type='InfiniteSampler'),
                    collate_fn=lambda batch: dict(inputs=torch.stack(batch)),
                ),
                train_cfg=dict(by_epoch=False, max_iters=STEPS),
                optim_wrapper=config.optim_wrapper,
                param_scheduler=config.param_scheduler,
                auto_scale_lr=dict(config.auto_scale_lr, enable=True),
                default_hooks=dict(checkpoint=None, logger=None),
                custom_hooks=[record],
                experiment_name=f'{tmp_path.name}_{name}',
            ).train()
            seen[factor, batch_size] = record.rates
    for batch_size in (1, 2):
        assert len(seen[4, batch_size]) == STEPS
        for step in (0, 99, STEPS - 1):
            want = pytest.approx(seen[1, batch_size][step])
            assert seen[4, batch_size][step] == want
    assert seen[4, 2][0] == pytest.approx([2 * r for r in seen[4, 1][0]])


def test_momentum_stays():
    """What is no rate is not scaled, whatever it is called."""
    schedulers = [
        dict(type='CosineAnnealingMomentum', eta_min=0.85, T_max=9),
        dict(type='PolyParamScheduler', param_name='weight_decay', eta_min=0.1),
    ]
    optimizer = dict(type='SGD', lr=1.0, momentum=0.9, weight_decay=0.2)
    stock, cfg, changes = scaled(
        2, optim_wrapper=dict(optimizer=optimizer), param_scheduler=schedulers
    )
    assert cfg.param_scheduler == stock.param_scheduler
    stock.optim_wrapper.optimizer.lr = 0.5
    assert cfg.optim_wrapper == stock.optim_wrapper
    assert [c.path.split('.')[-1] for c in changes] == ['batch_size', 'lr']


@given(
    before=st.integers(1, 64),
    batch_size=st.integers(1, 64),
    base=st.integers(1, 4096),
    gpus=st.integers(1, 64),
    lr=st.floats(1e-6, 10),
)
def test_auto_scale_lr(before, batch_size, base, gpus, lr):
    """It gives one rate for one real batch, converted or not."""
    optimizer = dict(type='SGD', lr=lr)
    stock, cfg, _ = scaled(
        batch_size, before=before, base=base, optim_wrapper=dict(optimizer=optimizer)
    )

    def rate(cfg, real):
        # as mmengine's Runner.scale_lr does
        base = cfg.auto_scale_lr.base_batch_size
        return cfg.optim_wrapper.optimizer.lr * (float(real) / float(base))

    real = gpus * batch_size
    assert rate(cfg, real) == pytest.approx(rate(stock, real), rel=1e-12)
    given = cfg.auto_scale_lr.base_batch_size
    assert given == float(Fraction(base * batch_size, before))
    assert isinstance(given, int) == (base * batch_size % before == 0)


def test_auto_scale_lr_of_mmengine(tmp_path):
    """Runner takes a base of half a picture."""
    wrapper = dict(optimizer=dict(type='SGD', lr=0.32))
    _, cfg, _ = scaled(1, before=32, base=16, optim_wrapper=wrapper)
    assert cfg.auto_scale_lr.base_batch_size == 0.5
    runner = Runner(
        nn.Linear(1, 1),
        str(tmp_path),
        train_dataloader=dict(batch_size=1),
        train_cfg=dict(by_epoch=False, max_iters=1),
        optim_wrapper=cfg.optim_wrapper,
        experiment_name=tmp_path.name,
    )
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.scale_lr(wrapper, dict(cfg.auto_scale_lr, enable=True))
    (group,) = wrapper.optimizer.param_groups
    assert group['lr'] == pytest.approx(0.32 / 16)


@pytest.mark.parametrize(
    'settings, path, why',
    [
        (
            dict(optim_wrapper=dict(optimizer=dict(type='Adafactor', lr=None))),
            'optim_wrapper.optimizer.lr',
            'Adafactor finds the rate by itself',
        ),
        (
            dict(optim_wrapper=dict(optimizer=dict(type='Prodigy', lr=1.0))),
            'optim_wrapper.optimizer.lr',
            'Prodigy finds the rate by itself',
        ),
        (
            dict(optim_wrapper=dict(optimizer=dict(type='Unheard'))),
            'optim_wrapper.optimizer.lr',
            'the default of Unheard is unknown',
        ),
        (dict(), 'optim_wrapper', 'no optimizer'),
        (
            dict(optim_wrapper=dict(constructor='Mine', backbone_lr=0.1)),
            'optim_wrapper.backbone_lr',
            'not scaled',
        ),
        (
            dict(custom_hooks=[dict(type='Mine', warmup_lr=0.1)]),
            'custom_hooks.0.warmup_lr',
            'not scaled',
        ),
        (
            dict(param_scheduler=dict(type='Mine', eta_max=0.1)),
            'param_scheduler.eta_max',
            'not scaled',
        ),
        (
            dict(param_scheduler=[dict(type='MyLR', peak_lr=0.1)]),
            'param_scheduler.0.peak_lr',
            'not scaled',
        ),
    ],
)
def test_what_is_not_scaled_is_named(settings, path, why):
    stock, cfg, changes = scaled(2, **settings)
    (said,) = [c for c in changes if c.path == path]
    assert said.before == said.after and why in said.note
    cfg.train_dataloader.batch_size = stock.train_dataloader.batch_size
    assert cfg.to_dict() == stock.to_dict()


def test_hook_with_a_rate():
    """SimSiam's holds the predictor's."""
    hook = dict(type='SimSiamHook', fix_pred_lr=True, lr=0.05)
    paramwise = dict(custom_keys={'predictor': dict(fix_lr=True)})
    wrapper = dict(optimizer=sgd(0.05), paramwise_cfg=paramwise)
    _, cfg, _ = scaled(1, optim_wrapper=wrapper, custom_hooks=[hook])
    assert cfg.custom_hooks[0].lr == 0.05 / 4 == cfg.optim_wrapper.optimizer.lr
    assert cfg.custom_hooks[0].fix_pred_lr is True
    assert cfg.optim_wrapper.paramwise_cfg == paramwise


def test_shared_dicts_are_scaled_once():
    """``sched = dict(...)`` may stand in a new-style config in two places."""
    cfg = Config(dict(train_dataloader=dict(batch_size=2)))
    one = ConfigDict(type='PolyLR', eta_min=0.1)
    optimizer = ConfigDict(type='SGD', lr=1.0)
    parts = ConfigDict()
    for name in ('generator', 'discriminator'):
        dict.__setitem__(parts, name, ConfigDict())
        dict.__setitem__(parts[name], 'optimizer', optimizer)
    cfg.optim_wrapper = parts
    cfg.param_scheduler = [one]
    cfg.param_scheduler.append(one)
    scale_batch_size(Context(MODELS, ConfigDict(type='BCN')), cfg, 1)
    assert cfg.optim_wrapper.generator.optimizer.lr == 0.5
    assert [s.eta_min for s in cfg.param_scheduler] == [0.05, 0.05]


def test_linear_is_explained_once():
    wrapper = dict(
        constructor='OneOfEach',
        generator=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        discriminator=dict(optimizer=dict(type='AdamW', lr=1e-4)),
    )
    _, _, changes = scaled(1, optim_wrapper=wrapper)
    notes = [c.note for c in changes if 'square root' in c.note]
    assert len(notes) == 1 and 'times 0.5)' in notes[0]
    _, _, changes = scaled(1, optim_wrapper=dict(optimizer=sgd()))
    assert not any('square root' in c.note for c in changes)


def by_iterations():
    return dict(
        optim_wrapper=dict(optimizer=sgd()),
        train_cfg=dict(
            type='IterBasedTrainLoop',
            max_iters=STEPS,
            val_interval=40,
            dynamic_intervals=[(100, 10)],
        ),
        param_scheduler=[
            WARMUP,
            dict(COSINE, end=STEPS),
            STEP,
            dict(type='StepLR', step_size=30, by_epoch=False),
            dict(type='ExponentialLR', gamma=0.81, by_epoch=False),
            dict(type='CosineRestartLR', periods=[60, 60], by_epoch=False),
            dict(ONE_CYCLE, total_steps=STEPS),
            dict(type='CosineAnnealingMomentum', T_max=STEPS, by_epoch=False),
            dict(type='MultiStepLR', milestones=[8, 11], end=12),
        ],
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=40),
            logger=dict(type='LoggerHook', interval=50),
        ),
        custom_hooks=[
            dict(type='EMAHook', begin_iter=20),
            dict(type='DenseCLHook', start_iters=10),
        ],
    )


def test_pictures_seen():
    """Training sees fewer, and it is said once; or as many as before."""
    settings = by_iterations()
    stock, cfg, changes = scaled(2, **settings)
    assert cfg.train_cfg == stock.train_cfg
    (note,) = [c.note for c in changes if 'pictures' in c.note]
    assert 'sees 0.5 times' in note and '--keep-epochs' in note and 'to 240' in note

    _, cfg, changes = scaled(2, keep_epochs=True, **settings)
    assert not any('sees' in c.note for c in changes)
    loop = cfg.train_cfg
    assert (loop.max_iters, loop.val_interval) == (2 * STEPS, 80)
    assert list(map(list, loop.dynamic_intervals)) == [[200, 20]]
    warmup, cosine, step, steps, gamma, restarts, cycle, momentum, epochs = (
        cfg.param_scheduler
    )
    assert warmup.end == 100 and warmup.start_factor == 0.01
    assert (cosine.begin, cosine.T_max, cosine.end) == (100, 140, 2 * STEPS)
    assert step.milestones == [160, 220] and step.end == 2 * STEPS
    assert steps.step_size == 60 and gamma.gamma == pytest.approx(0.9)
    assert restarts.periods == [120, 120] and cycle.total_steps == 2 * STEPS
    assert momentum.T_max == 2 * STEPS
    assert epochs == settings['param_scheduler'][-1]
    assert cfg.default_hooks.checkpoint.interval == 80
    assert cfg.default_hooks.logger.interval == 50
    assert cfg.custom_hooks[0].begin_iter == 40
    (said,) = [c for c in changes if c.path == 'custom_hooks.1.start_iters']
    assert said.before == said.after == 10 and 'not stretched' in said.note


def test_epochs_see_what_they_saw():
    settings = dict(
        optim_wrapper=dict(optimizer=sgd()),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1),
        param_scheduler=[WARMUP, dict(type='MultiStepLR', milestones=[8, 11], end=12)],
    )
    for keep_epochs in (False, True):
        stock, cfg, changes = scaled(2, keep_epochs, **settings)
        assert cfg.train_cfg == stock.train_cfg
        assert cfg.param_scheduler[1] == stock.param_scheduler[1]
        assert cfg.param_scheduler[0].end == (100 if keep_epochs else 50)
        assert not any('sees' in c.note for c in changes)


@given(
    before=st.integers(1, 64),
    batch_size=st.integers(1, 64),
    begin=st.integers(0, 5),
    length=st.integers(1, 1000),
)
def test_stretched_schedules_are_schedules(before, batch_size, begin, length):
    """They begin and end with the loop, and end after they begin."""
    end = begin + length
    schedulers = [
        dict(type='LinearLR', by_epoch=False, begin=begin, end=end),
        dict(type='PolyLR', by_epoch=False, end=10**9),
    ]
    _, cfg, _ = scaled(
        batch_size,
        keep_epochs=True,
        before=before,
        optim_wrapper=dict(optimizer=sgd()),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=end, val_interval=end),
        param_scheduler=schedulers,
    )
    first, forever = cfg.param_scheduler
    assert 0 <= first.begin < first.end and forever.end == 10**9
    want = end * before / batch_size
    assert cfg.train_cfg.max_iters == pytest.approx(want, abs=1)
    assert cfg.train_cfg.val_interval == cfg.train_cfg.max_iters
    assert first.end in (cfg.train_cfg.max_iters, first.begin + 1)


@pytest.mark.parametrize('batch_size', [None, '4'])
def test_no_batch_size(batch_size):
    with pytest.raises(ValueError, match='no train_dataloader'):
        scaled(2, before=batch_size)
