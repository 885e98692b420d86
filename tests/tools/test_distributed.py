"""Several processes on gloo, started by the scripts that users start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_torch, run
from support.dump_state import check_threads
from test_train_test import (
    CONFIGS,
    QUIET,
    SHORT,
    checkpoints,
    metrics,
    scalars,
)

from bcn_mm.weights.reading import read_checkpoint

pytestmark = pytest.mark.slow

CONFIG = CONFIGS['det']
OPTIONS = ['--cfg-options', *SHORT['det'], *QUIET]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def environment(shapes) -> dict:
    return dict(
        SHAPES_ROOT=str(shapes),
        PORT=free_port(),
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT / 'tests'),
        OMP_NUM_THREADS='1',
    )


def dumping_ranks(folder: Path, base: str = CONFIG) -> Path:
    config = folder / 'dumping_ranks.py'
    config.write_text(
        f"_base_ = '{ROOT / base}'\n"
        "custom_imports = dict(imports=['bcn_mm', 'support.dump_state'])\n"
        "custom_hooks = [dict(type='SyncEstimatesHook'), "
        f"dict(type='DumpRanks', folder='{folder}')]\n"
    )
    return config


def check_ranks_agree(folder: Path) -> None:
    """The same parameters and estimates, and estimates that have moved."""
    first, second = (torch.load(folder / f'rank{r}.pth') for r in range(2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    moved = [v for k, v in first.items() if k.endswith('running_mean')]
    assert len(moved) > 20 and all(v.abs().max() > 0 for v in moved)


def train_pair(task, folder, shapes, *more, machines=1) -> Path:
    """Train on two ranks; those of two machines meet on the loopback device."""
    words = [
        'bash',
        'tools/dist_train.sh',
        dumping_ranks(folder, CONFIGS[task]),
        str(2 // machines),
        '--work-dir',
        str(folder),
        '--cfg-options',
        *SHORT[task],
        *QUIET,
        *more,
    ]
    shared = environment(shapes)
    jobs = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **shared, 'NNODES': str(machines), 'NODE_RANK': str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(machines)
    ]
    for job in jobs:
        output, _ = job.communicate(timeout=600)
        assert job.returncode == 0, output[-3000:]
        check_threads(output)
    return folder


@pytest.fixture(scope='module')
def pair(shapes, tmp_path_factory):
    """What is trained on two machines; other tests take one."""
    return train_pair('det', tmp_path_factory.mktemp('det'), shapes, machines=2)


def check_saved(folder: Path, iterations: int) -> None:
    """The newest checkpoint is what all ranks hold."""
    end = read_checkpoint(str(checkpoints(folder)[-1]))
    assert end['meta']['iter'] == iterations
    first = torch.load(folder / 'rank0.pth')
    for name, value in end['state_dict'].items():
        torch.testing.assert_close(value, first[name], msg=name)


def test_ranks_of_two_machines_agree(pair):
    check_ranks_agree(pair)
    check_saved(pair, 12)  # 2 passes over 12 pictures by 2 ranks


def test_ranks_agree_without_epochs(shapes, tmp_path):
    check_ranks_agree(train_pair('seg', tmp_path, shapes))
    check_saved(tmp_path, 24)


def losses(folder: Path) -> list:
    return [row['loss'] for row in scalars(folder) if 'loss' in row]


def passes(folder: Path) -> list:
    """How many training passes each layer counts."""
    state = torch.load(folder / 'rank0.pth')
    return [int(v) for k, v in state.items() if 'num_batches_tracked' in k]


def test_growing(pair, shapes, tmp_path):
    """Activation checkpointing, which repeats passes in the backward pass,
    and a search for unused parameters change nothing but rounding, with
    activations that are recomputed beside it."""
    for name, options in dict(
        recomputed=['model.backbone.with_cp=True', '--save-memory'],
        searched=['find_unused_parameters=True', '--save-memory'],
    ).items():
        folder = tmp_path / name
        folder.mkdir()
        train_pair('det', folder, shapes, *options)
        check_ranks_agree(folder)
        assert losses(folder) == pytest.approx(losses(pair), rel=1e-2)
        assert passes(folder) == passes(pair)


def test_recomputed_activations(pair, shapes, tmp_path):
    """Are the same on every rank, bit for bit."""
    train_pair('det', tmp_path, shapes, '--save-memory')
    assert losses(tmp_path) == losses(pair)
    for rank in range(2):
        one, two = (torch.load(f / f'rank{rank}.pth') for f in (pair, tmp_path))
        assert all(torch.equal(one[name], value) for name, value in two.items())


def test_gradient_accumulation(shapes, tmp_path):
    """Every pass moves the estimates, whether the optimizer steps or not."""
    train_pair(
        'det',
        tmp_path,
        shapes,
        'optim_wrapper.accumulative_counts=3',
        'find_unused_parameters=True',
    )
    check_ranks_agree(tmp_path)
    state = torch.load(tmp_path / 'rank0.pth')
    passes = [v for k, v in state.items() if 'num_batches_tracked' in k]
    assert passes and all(n >= 12 for n in passes)


@needs_torch(2, 6, 'FSDP without a GPU')
def test_fsdp(pair, shapes, tmp_path, python):
    """mmengine's FSDP trains as its DDP does, and its checkpoint is one."""
    config = tmp_path / 'fsdp.py'
    config.write_text(
        f"_base_ = '{ROOT / CONFIG}'\n"
        "custom_imports = dict(imports=['bcn_mm', 'support.dump_state'])\n"
        "runner_type = 'FlexibleRunner'\n"
        "strategy = dict(type='FSDPStrategy', state_dict_cfg='full',\n"
        '    model_wrapper=dict(use_orig_params=True, '
        'auto_wrap_policy=dict(\n'
        "        type='torch.distributed.fsdp.wrap."
        "size_based_auto_wrap_policy',\n"
        '        min_num_params=50000)))\n'
    )
    done = run(
        'bash',
        'tools/dist_train.sh',
        config,
        2,
        '--work-dir',
        tmp_path,
        '--save-memory',
        *OPTIONS,
        **environment(shapes),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'RecomputeActivationsHook:' in done.stdout
    check_threads(done.stdout)
    assert losses(tmp_path) == pytest.approx(losses(pair), rel=1e-2)
    python(
        'tools/test.py',
        CONFIG,
        checkpoints(tmp_path)[-1],
        '--work-dir',
        tmp_path / 'test',
        *OPTIONS,
        SHAPES_ROOT=str(shapes),
    )
    validated = [r for r in scalars(tmp_path) if 'coco/bbox_mAP' in r][-1]
    tested = metrics(tmp_path / 'test')
    assert tested['coco/bbox_mAP'] == pytest.approx(
        validated['coco/bbox_mAP'], abs=1e-3
    )


def test_uneven_data(shapes, tmp_path):
    """Ranks that would wait for each other say so, and end."""
    done = run(
        'bash',
        'tools/dist_train.sh',
        dumping_ranks(tmp_path),
        2,
        '--work-dir',
        tmp_path,
        *OPTIONS,
        'train_dataloader.sampler.type=UnevenSampler',
        'model.backbone.norm_cfg.type=SyncBCN',
        timeout=120,
        **environment(shapes),
    )
    assert done.returncode != 0
    message = r'ranks have different numbers of batches \(\[6, 5\]\)'
    assert re.search(message, done.stdout), done.stdout[-3000:]
    assert not checkpoints(tmp_path)


def test_dist_test_repeats_the_single_process(pair, shapes, tmp_path, python):
    newest = checkpoints(pair)[-1]
    done = run(
        'bash',
        'tools/dist_test.sh',
        CONFIG,
        newest,
        2,
        '--work-dir',
        tmp_path / 'two',
        *OPTIONS,
        **environment(shapes),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    python(
        'tools/test.py',
        CONFIG,
        newest,
        '--work-dir',
        tmp_path / 'one',
        *OPTIONS,
        SHAPES_ROOT=str(shapes),
    )
    two, one = metrics(tmp_path / 'two'), metrics(tmp_path / 'one')
    names = [k for k in one if 'mAP' in k]
    assert names and all(two[k] == one[k] for k in names)


def process_of(rank: int, marker: str) -> int:
    """The process of a rank in the job whose command line has the marker."""
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            words = (folder / 'cmdline').read_text().split('\0')
            variables = (folder / 'environ').read_text().split('\0')
        except OSError:
            continue  # it is gone, or another user's
        if marker in words and f'RANK={rank}' in variables:
            return int(folder.name)
    raise AssertionError(f'no process of rank {rank}')


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs /proc')
def test_a_killed_rank(shapes, tmp_path):
    """Ends the job, is named, and costs what the last checkpoint lacks."""
    options = [*OPTIONS, 'train_cfg.max_epochs=100']
    options[options.index('train_cfg.val_interval=2')] = 'train_cfg.val_interval=100'
    job = subprocess.Popen(
        [
            'bash',
            'tools/dist_train.sh',
            CONFIG,
            '2',
            '--work-dir',
            str(tmp_path),
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, **environment(shapes)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for _ in range(240):
            if (tmp_path / 'last_checkpoint').exists() or job.poll():
                break
            time.sleep(0.5)
        os.kill(process_of(1, str(tmp_path)), signal.SIGKILL)
        output, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0
    assert re.search(r'rank\s*: 1 ', output), output[-3000:]
    assert 'SIGKILL' in output

    saved = checkpoints(tmp_path)
    last = read_checkpoint(str(saved[-1]))['meta']
    assert last['iter'] == last['epoch'] * 6
    more = last['epoch'] + 1
    end = [f'train_cfg.max_epochs={more}', 'train_cfg.val_interval=100']
    done = run(
        'bash',
        'tools/dist_train.sh',
        CONFIG,
        2,
        '--work-dir',
        tmp_path,
        '--resume',
        *options,
        *end,
        **environment(shapes),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert read_checkpoint(str(checkpoints(tmp_path)[-1]))['meta']['iter'] == (more * 6)
    # one process has twice the steps in an epoch, and goes on all the same
    end[0] = f'train_cfg.max_epochs={more + 1}'
    done = run(
        sys.executable,
        'tools/train.py',
        CONFIG,
        '--work-dir',
        tmp_path,
        '--resume',
        *options,
        *end,
        SHAPES_ROOT=str(shapes),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert checkpoints(tmp_path)[-1].name == f'epoch_{more + 1}.pth'
