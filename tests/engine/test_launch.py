"""Runners, on every launcher, with GPUs or without."""

import errno
import multiprocessing
import os
import random
import socket
import time
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS, MODELS
from mmengine.runner import save_checkpoint
from support.ranks import START
from torch import nn

from bcn_mm import BCN
from bcn_mm.engine.launch import (
    RANK_VARIABLES,
    AtomicLocalBackend,
    build_runner,
    find_newest_checkpoint,
    prepare_launch,
    taken_back,
)
from bcn_mm.errors import InputError
from bcn_mm.weights.reading import read_checkpoint


@pytest.fixture(params=[False, True], ids=['CPU', 'CUDA'])
def cuda(request, monkeypatch):
    """Whether there seems to be a GPU; and an environment of this test's."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: request.param)
    names = [*sum(RANK_VARIABLES.values(), ()), 'MASTER_ADDR', 'MASTER_PORT']
    with mock.patch.dict(os.environ):
        for name in names:
            os.environ.pop(name, None)
        yield request.param


@pytest.mark.parametrize(
    'launcher, message',
    [
        ('pytorch', 'sets RANK and WORLD_SIZE and LOCAL_RANK; .* torchrun'),
        ('slurm', 'sets SLURM_PROCID .* with srun'),
        ('mpi', 'sets OMPI_COMM_WORLD_RANK .* with mpirun'),
    ],
)
def test_launchers_that_did_not_start_this(cuda, launcher, message):
    with pytest.raises(InputError, match=message):
        build_runner(Config(dict(launcher=launcher)))


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_a_launcher_that_does_not_say_where(cuda, launcher):
    os.environ.pop('SLURM_JOB_NODELIST', None)
    os.environ.update(dict.fromkeys(RANK_VARIABLES[launcher], '0'))
    with pytest.raises(InputError, match='set MASTER_ADDR'):
        build_runner(Config(dict(launcher=launcher)))


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
@pytest.mark.parametrize('seed', range(4))
def test_every_rank_names_its_own_gpu(launcher, seed, monkeypatch):
    """mmengine's DDP takes LOCAL_RANK, which mpirun does not set and which
    reading the arguments has set to 0."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    chance = random.Random(seed)
    machines = [chance.randint(1, 8) for _ in range(chance.randint(1, 3))]
    port = chance.choice([None, '1234'])
    seen = set()
    for machine, gpus in enumerate(machines):
        for gpu in range(gpus):
            rank = sum(machines[:machine]) + gpu
            given = map(str, (rank, sum(machines), gpu))
            given = dict(zip(RANK_VARIABLES[launcher], given))
            given.update(LOCAL_RANK='0', MASTER_ADDR='a.host')
            with mock.patch.dict(os.environ, given):
                os.environ.pop('MASTER_PORT', None)
                if port:
                    os.environ['MASTER_PORT'] = port
                prepare_launch(Config(dict(launcher=launcher)))
                said = [os.environ[name] for name in RANK_VARIABLES['pytorch']]
                assert os.environ['MASTER_ADDR'] == 'a.host'
                assert os.environ['MASTER_PORT'] == (port or '29500')
            assert said == [str(rank), str(sum(machines)), str(gpu)]
            seen.add((machine, said[2]))
    assert len(seen) == sum(machines)
    assert not torch.distributed.is_initialized()  # mmengine does that


@MODEL_WRAPPERS.register_module()
class OwnWrapper(MMDistributedDataParallel):
    """A user's."""


@pytest.mark.parametrize(
    'wrapper, want',
    [
        (dict(), False),
        (dict(find_unused_parameters=True), False),
        (dict(type='MMDistributedDataParallel', bucket_cap_mb=5), False),
        (dict(type='DistributedDataParallel'), False),
        (dict(type='mmengine.MMDistributedDataParallel'), False),
        (dict(type='MMSeparateDistributedDataParallel'), False),
        (dict(type='OwnWrapper'), False),
        (dict(type=OwnWrapper), False),
        (dict(type='OwnWrapper', broadcast_buffers=True), True),
        (dict(broadcast_buffers=True), True),
        (dict(broadcast_buffers=False), False),
        # what torch calls it from 2.13 on
        (dict(forward_sync_buffers=True), None),
        (dict(type='MMFullyShardedDataParallel'), None),
        (dict(type='DataParallel'), None),
    ],
)
def test_ranks_keep_their_own_estimates(wrapper, want, monkeypatch):
    """Under a wrapper of the user's too, unless that says otherwise."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    names = (*RANK_VARIABLES['pytorch'], 'MASTER_ADDR')
    environment = dict.fromkeys(names, '0')
    with mock.patch.dict(os.environ, environment):
        for strategy in (None, 'DDPStrategy'):
            cfg = dict(launcher='pytorch', model_wrapper_cfg=dict(wrapper))
            if strategy:
                own = dict(model_wrapper=cfg.pop('model_wrapper_cfg'))
                cfg.update(strategy=dict(type=strategy, **own))
            cfg = Config(cfg)
            prepare_launch(cfg)
            node = cfg.get('model_wrapper_cfg')
            if strategy:
                assert node is None
                node = cfg.strategy.model_wrapper
            assert node.get('broadcast_buffers') is want
            assert {k: node[k] for k in wrapper} == wrapper
            for key in ('device_ids', 'type'):  # mmengine's business
                assert (key in node) == (key in wrapper)
        for cfg in (dict(), dict(strategy=dict(type='DDPStrategy'))):
            cfg = Config(dict(cfg, launcher='pytorch'))
            prepare_launch(cfg)  # nothing to say where a user says nothing
            assert 'model_wrapper_cfg' not in cfg


@MODELS.register_module()
class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BCN(4)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.norm(self.conv(inputs)).mean())


def launch(rank, port, folder):
    os.environ.update(zip(RANK_VARIABLES['mpi'], map(str, (rank, 2, rank))))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ['LOCAL_RANK'] = '0'
    cfg = Config(
        dict(
            model=dict(type='Tiny'),
            work_dir=folder,
            launcher='mpi',
            model_wrapper_cfg=dict(bucket_cap_mb=5),
        )
    )
    model = build_runner(cfg).model
    torch.manual_seed(rank)
    for _ in range(2):
        model(torch.randn(1, 3, 6, 6), mode='loss')['loss'].backward()
    moved = model.module.norm.running_mean
    torch.save((model.broadcast_buffers, moved), f'{folder}/{rank}.pt')


def test_ranks_without_a_gpu_keep_theirs(tmp_path):
    """The same, of a runner that mpirun's variables start on gloo."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    torch.multiprocessing.start_processes(
        launch, (port, str(tmp_path)), nprocs=2, start_method=START
    )
    (first, one), (second, two) = (
        torch.load(tmp_path / f'{rank}.pt') for rank in range(2)
    )
    assert first is second is False
    assert not torch.equal(one, two)


@pytest.fixture
def atomic():
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
    yield
    register_backend('local', LocalBackend, force=True, prefixes='')


def save_for_ever(path):
    torch.set_num_threads(1)
    state = dict(state_dict=dict(weight=torch.zeros(1 << 22)))
    for i in range(1 << 20):
        state['state_dict']['weight'].fill_(i)
        save_checkpoint(state, path)


def test_killed_while_it_writes_a_checkpoint(atomic, tmp_path):
    """Twenty times, in the middle of things; what is there is whole."""
    path, draft = str(tmp_path / 'epoch_1.pth'), tmp_path / 'epoch_1.pth.part'
    chance, drafts = random.Random(0), 0
    for _ in range(20):
        process = multiprocessing.get_context('fork').Process(
            target=save_for_ever, args=(path,)
        )
        process.start()
        while not draft.exists():  # it begins to write
            time.sleep(0.001)
        time.sleep(0.2 * chance.random())
        process.kill()
        process.join()
        drafts += draft.exists()
        draft.unlink(missing_ok=True)
        if os.path.exists(path):
            weight = read_checkpoint(path)['state_dict']['weight']
            assert (weight == weight[0]).all()
    assert os.path.exists(path) and drafts > 0  # some were half-way


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(atomic, code, tmp_path, monkeypatch):
    """In the middle of a file; what was there is kept, also what was to go."""
    path, old = tmp_path / 'epoch_2.pth', tmp_path / 'epoch_1.pth'
    backend = get_file_backend(str(path))
    for file in (path, old):
        backend.put(b'before', str(file))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', mock.Mock(side_effect=OSError(code, 'full')))
        backend.remove(str(old))
        with pytest.raises(InputError, match=f'^disk full: {path} .*--resume'):
            backend.put(b'after', str(path))
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == {
        path: b'before',
        old: b'before',
    }
    # the next that is written, by whatever backend
    get_file_backend(str(path)).put(b'after', str(path))
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == {path: b'after'}


def test_checkpoints_that_come_back(atomic, tmp_path):
    """Removed and written again, and what is no checkpoint."""
    path, other = tmp_path / 'best.pth', tmp_path / 'a.json'
    backend = get_file_backend(str(path))
    for content in (b'1', b'2'):
        backend.put(content, str(path))
        backend.remove(str(path))
    backend.put(b'3', str(path))
    assert path.read_bytes() == b'3'
    backend.put(b'', str(other))
    backend.remove(str(other))
    assert not other.exists()
    with pytest.raises(FileNotFoundError):
        backend.remove(str(tmp_path / 'gone.pth'))


@pytest.mark.parametrize('there', [False, True])
def test_what_did_not_start_is_taken_back(there, tmp_path):
    """Its logs and folders, and nothing of anybody else's."""
    work_dir = tmp_path / 'a' / 'b'
    name = f'own_{there}.py'  # mmengine's loggers go by it, and the second
    if there:
        (work_dir / '20200101_000000').mkdir(parents=True)
        (work_dir / '20200101_000000' / 'x.log').write_text('log')
        (work_dir / name).write_text('old = 1')
    before = {p: p.is_dir() or p.read_text() for p in tmp_path.rglob('*')}
    path = tmp_path / name
    path.write_text('new = 1')
    cfg = Config.fromfile(path)
    path.unlink()
    cfg.update(model=dict(type='Tiny'), work_dir=str(work_dir), launcher='none')
    stop = pytest.raises(InputError, match='stop')
    with stop, taken_back(cfg.work_dir, cfg.filename):
        build_runner(cfg)
        assert len(list(work_dir.glob('*/*.log'))) == 1 + there
        assert 'new = 1' in (work_dir / name).read_text()
        raise InputError('stop')
    after = {p: p.is_dir() or p.read_text() for p in tmp_path.rglob('*')}
    assert after == before


def test_newest_checkpoint(tmp_path):
    assert find_newest_checkpoint(str(tmp_path)) is None
    named = tmp_path / 'last_checkpoint'
    named.write_text('')
    assert find_newest_checkpoint(str(tmp_path)) is None
    for i, name in enumerate(('iter_2.pth', 'iter_10.pth')):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (i, i))
    newest = find_newest_checkpoint(str(tmp_path))
    assert newest == str(tmp_path / 'iter_10.pth')
    named.write_text('s3://elsewhere.pth')
    assert find_newest_checkpoint(str(tmp_path)) == 's3://elsewhere.pth'
    named.write_text(str(tmp_path / 'iter_2.pth'))
    assert find_newest_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_2.pth')
    named.write_text('moved.pth')
    assert find_newest_checkpoint(str(tmp_path)) == newest
    for name in ('iter_2.pth', 'iter_10.pth'):
        (tmp_path / name).unlink()
    # which is then said to be missing
    assert find_newest_checkpoint(str(tmp_path)) == 'moved.pth'
