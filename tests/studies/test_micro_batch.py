"""The study of error against images per step, on a very small scale."""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from bcn_mm import BCN
from studies.micro_batch.norms import NORMS, parse_norm
from studies.micro_batch.report import draw
from studies.micro_batch.tasks import TASKS, Run, digits

pytest_plugins = ['study_data']
STUDY = ('-m', 'studies.micro_batch')

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec('sklearn') is None,
    reason="the digits need scikit-learn: pip install '.[study]'",
)


def results(folder):
    records = json.loads((folder / 'results.json').read_text())
    return {(r['task'], r['norm'], r['images'], r['seed']): r['error'] for r in records}


@needs_digits
@pytest.mark.slow
def test_goes_on_and_grows(tmp_path, python, one_by_one):
    words = '--tasks', 'digits', '--epochs', 1, '--seeds', 2, '--images', 8, 16
    words += '--work-dir', tmp_path, '--norms', 'bn'
    variant = 'bcn-ws,momentum=0.1,start=average'
    python(*STUDY, *words, '--workers', 1)
    first = results(tmp_path)
    assert set(first) == {('digits', 'bn', n, seed) for n in (8, 16) for seed in (0, 1)}
    assert all(0 < error < 100 for error in first.values())
    assert len(set(first.values())) > 1
    # what a process that died had begun to write, and a run of another command
    broken, strange = (
        next((tmp_path / 'runs').glob(f'digits_bn_{n}_*_s0.json')) for n in (8, 16)
    )
    broken.write_text('{"task": "dig')
    other = dict(json.loads(strange.read_text()), epochs=7, error=99.0)
    strange.write_text(json.dumps(other))
    kept = [f for f in (tmp_path / 'runs').iterdir() if 's1' in f.name]
    times = [f.stat().st_mtime_ns for f in kept]
    shown = one_by_one(*words, variant)
    assert [f.stat().st_mtime_ns for f in kept] == times and len(kept) == 2
    second = results(tmp_path)
    assert {k: second[k] for k in first} == first and len(second) == 8
    assert 'BCN + WS, momentum 0.1, start average' in shown
    with (tmp_path / 'results.csv').open() as file:
        for row in csv.DictReader(file):
            errors = [
                error
                for key, error in second.items()
                if key[1:3] == (row['norm'], int(row['images_per_step']))
            ]
            assert float(row['error_mean']) == pytest.approx(np.mean(errors))
            assert float(row['error_se']) == pytest.approx(
                abs(errors[0] - errors[1]) / 2
            )
    assert cv2.imread(str(tmp_path / 'error.png')).std() > 10
    assert not list(tmp_path.rglob('*.part*'))


@needs_digits
def test_momentum_follows_the_learning_rate(monkeypatch, tmp_path):
    """Down half a cosine over 20 steps."""
    built = []
    build = digits.classifier
    monkeypatch.setattr(
        digits,
        'classifier',
        lambda norm: built.append(build(norm)) or built[-1],
    )
    for option in ('', ',follow_lr=true'):
        norm = f'bcn,momentum=0.4{option}'
        TASKS['digits'].train(
            Run('digits', norm, 100, seed=0, epochs=2, pictures=1000, rate=0.1),
            tmp_path,
        )
    for model, last in zip(built, (0.4, 0.2 * (1 + np.cos(np.pi * 19 / 20)))):
        momenta = [m.momentum for m in model.modules() if isinstance(m, BCN)]
        assert momenta == pytest.approx([last] * 4)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_shapes(task, shapes, tmp_path, forked, one_by_one):
    out = one_by_one(
        *('--tasks', task, '--images', 4, '--seeds', 1, '--norms', 'bcn-ws'),
        *('--rates', 0.01, '--epochs', 1, '--data', shapes),
        *('--work-dir', tmp_path),
    )
    (record,) = json.loads((tmp_path / 'results.json').read_text())
    assert record['held_out'] == 2 and 0 < record['held'] <= 100
    assert [step for step, _ in record['curve']] == [3]
    assert dict(det='Mask R-CNN', seg='FCN')[task] in out
    assert all(0 < error <= 100 for error in results(tmp_path).values())
    assert not list(tmp_path.rglob('*.pth'))
    with (tmp_path / 'results.csv').open() as file:
        near = {r['norm']: r['near_percent'] for r in csv.DictReader(file)}
    # the network's 3 steps and 50 a window: the hook has nothing yet
    assert near == {'bcn-ws': ''}


@pytest.mark.parametrize(
    'task, norm',
    [
        ('det', 'bn'),
        ('det', 'gn-ws'),
        ('det', 'bcn-ws,momentum=0.2'),
        ('seg', 'ln'),
        ('seg', 'bcn-ws'),
        ('street', 'gn'),
        ('street', 'bcn-ws'),
        ('photos', 'in'),
        ('photos', 'bcn'),
    ],
)
def test_networks_have_the_norm_and_no_other(task, norm, data):
    run = Run(task, norm, 2, seed=5, epochs=3, pictures=11, rate=0.01)
    assert run.steps == 18
    cfg = TASKS[task].config(run)
    assert cfg.train_cfg.max_iters == 18 and cfg.randomness.seed == 5
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    init_default_scope(cfg.default_scope)
    layers = list(MODELS.build(cfg.model).modules())
    kinds = {
        'bn': nn.BatchNorm2d,
        'ln': nn.GroupNorm,
        'in': nn.InstanceNorm2d,
        'gn': nn.GroupNorm,
        'gn-ws': nn.GroupNorm,
    }
    kind = kinds.get(norm, BCN)
    found = [
        m
        for m in layers
        if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    ]
    assert len(found) > 15 and {type(m) for m in found} == {kind}
    if norm == 'ln':
        assert {m.num_groups for m in found} == {1}
    if ',' in norm:
        assert {m.momentum for m in found} == {0.2}
    assert ('-ws' in norm) == any('WSConv' in type(m).__name__ for m in layers)


@pytest.mark.parametrize('shift, images', [(0, 5), (1, 8), (2, 1)])
def test_every_digit_is_shown_once_in_an_epoch_and_moved(shift, images):
    torch.manual_seed(shift)
    pictures = torch.rand(30, 1, 4, 4)
    run = Run('digits', 'bn', images, 0, 40, len(pictures), 0.1, shift)
    moves = range(-shift, shift + 1)
    seen = {}
    for shown, classes in digits.batches(run, pictures, torch.arange(30)):
        for picture, k in zip(shown, classes.tolist()):
            seen.setdefault(k, []).append(picture[0].numpy())
    found = set()
    for k, shown in seen.items():
        # what leaves on one side does not come back on the other
        padded = np.pad(pictures[k, 0].numpy(), 2 * shift)
        moved = {
            np.roll(padded, move, (0, 1))[
                2 * shift : 2 * shift + 4, 2 * shift : 2 * shift + 4
            ].tobytes(): move
            for move in itertools.product(moves, moves)
        }
        assert len(shown) == run.epochs
        found.update(moved[picture.tobytes()] for picture in shown)
    assert len(seen) == 30 and len(found) == (2 * shift + 1) ** 2


@needs_digits
def test_the_digits_are_learned_and_repeatable(tmp_path):
    run = Run('digits', 'bn', 16, 0, 1, pictures=1000, rate=0.1, shift=1)
    errors = [TASKS['digits'].train(run, tmp_path)['error'] for _ in range(2)]
    assert errors[0] == errors[1] < 40  # 90 by chance


@pytest.mark.parametrize(
    'words, message',
    [
        (['--norms', 'bm'], "norm 'bm' is not one of bn, ln"),
        (['--norms', 'bcn,momentum'], 'arguments look like momentum=0.1'),
        (['--norms', 'bcn,follow_lr=true'], 'follow_lr is for digits'),
        (['--images', '0'], 'must be positive'),
        (['--seeds', '0'], 'must be positive'),
        (['--shift', '-1'], 'must not be negative'),
        (['--rates', '0'], '--rates must be positive'),
        (['--rates', '1', 'nan'], '--rates must be positive'),
        (['--norms', 'bcn,momentum=['], "'[' is no value"),
        (['--norms', 'bcn,eps=1e-3,eps=1e-4'], 'given twice'),
        (['--rates', '1', '--extend'], '--extend is for two --rates or more'),
        (['--tasks', 'street', '--norms', 'bn-frozen'], 'is none of street'),
        (
            ['--tasks', 'street', '--norms', 'bcn,warmup=9'],
            'warmup is for bn-weights',
        ),
        (['--tasks', 'street', '--street-data', '/no'], 'leftImg8bit is missing'),
        (['--tasks', 'photos', '--photo-data', '/no'], 'instances_train2017.json is'),
        (['--tasks', 'digits', '--show'], 'nothing of this is done'),
    ],
)
def test_bad_arguments(words, message, tmp_path, refused):
    line = refused(*STUDY, '--work-dir', tmp_path / 'x', *words)
    assert line.startswith('error: ') and message in line
    assert not list(tmp_path.iterdir())


def test_what_is_shown_alone_draws_no_data(tmp_path, refused):
    words = ('--tasks', 'det', '--show', '--data', tmp_path / 'shapes')
    line = refused(*STUDY, '--work-dir', tmp_path / 'x', *words)
    assert 'shapes: it is missing' in line
    assert not list(tmp_path.iterdir())


@needs_digits
def test_what_is_asked_for_twice_is_one_seed(tmp_path, one_by_one):
    words = '--tasks', 'digits', 'digits', '--images', 50, 50, '--seeds', 1
    words += '--epochs', 1, '--norms', 'gn', 'gn', '--work-dir', tmp_path
    one_by_one(*words)
    (row,) = csv.DictReader((tmp_path / 'results.csv').open())
    assert (row['seeds'], row['error_sd']) == ('1', 'nan')


@needs_digits
def test_digits_may_diverge(tmp_path):
    run = Run('digits', 'gn', 50, 0, 1, 1000, 1e8, 0, 0)
    assert TASKS['digits'].train(run, tmp_path)['diverged']


@needs_digits
def test_a_failed_run_is_said_and_tried_again(tmp_path, one_by_one, monkeypatch):
    words = '--tasks', 'digits', '--images', 16, '--seeds', 1, '--epochs', 1
    words += '--work-dir', tmp_path, '--norms', 'bn', 'bcn,num_groups=7'
    tried, train = [], TASKS['digits'].train
    monkeypatch.setattr(
        TASKS['digits'],
        'train',
        lambda run, folder: tried.append(run.norm) or train(run, folder),
    )
    for _ in range(2):
        assert '1 failed' in one_by_one(*words, code='error: 1 runs failed')
    assert sorted(tried) == ['bcn,num_groups=7', 'bcn,num_groups=7', 'bn']
    record = json.loads(next((tmp_path / 'runs').glob('*num_groups*')).read_text())
    assert 'num_groups=7 does not divide' in record['failed']


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc')
def test_leaves_no_process_behind(shapes, tmp_path):
    """Ended in the middle of a training, by what a scheduler sends."""
    process = subprocess.Popen(
        [
            sys.executable,
            *STUDY,
            '--tasks',
            'det',
            '--norms',
            'bn',
            '--images',
            '1',
            '--seeds',
            '1',
            '--data',
            shapes,
            '--work-dir',
            tmp_path,
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )

    def others():
        found = []
        for file in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                if str(tmp_path) in file.read_text():
                    found.append(int(file.parent.name))
        return found

    def begun():
        logs = (tmp_path / 'logs').glob('det_bn_1_*_s0/train.log')
        return any(log.stat().st_size for log in logs)

    deadline = time.monotonic() + 120
    while not begun():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    assert len(others()) > 1
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.strip().endswith('error: stopped')
    deadline = time.monotonic() + 30
    while others():
        assert time.monotonic() < deadline, others()
        time.sleep(0.2)


@pytest.mark.parametrize('tasks', [('det',), ('digits', 'det', 'seg')])
def test_the_legend_is_within_the_picture(tasks, tmp_path):
    """Of one panel and of several, with names as long as they get."""
    norms = [f'{name},num_groups=32' for name in ('gn', 'gn-ws', 'bcn', 'bcn-ws')]
    rows = {
        (task, norm, n): dict(mean=10.0 + n, sd=1.0, seeds=2)
        for task, norm, n in itertools.product(tasks, norms, (1, 2))
    }
    draw(rows, norms, tmp_path / 'error.png')
    picture = cv2.imread(str(tmp_path / 'error.png'))
    assert picture.std() > 10
    assert (picture[:, [0, 1, -2, -1]] == 255).all()


def test_variants_of_a_norm():
    norm = parse_norm('bcn-ws,momentum=0.1,start=average')
    assert norm.norm_cfg == dict(type='BCN', momentum=0.1, start='average')
    for none in ('null', 'None'):
        assert parse_norm(f'bcn,momentum={none}').norm_cfg['momentum'] is None
    for number in ('0.01', '1e-2', '.01'):
        assert parse_norm(f'bcn,momentum={number}').norm_cfg['momentum'] == 0.01
    assert parse_norm('bcn,num_groups=8').norm_cfg['num_groups'] == 8
    assert parse_norm('bcn,estimate=false').norm_cfg['estimate'] is False
    assert NORMS['bcn'].norm_cfg == dict(type='BCN')
