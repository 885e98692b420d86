import argparse
import collections
import multiprocessing
import os
import pickle
import random
import socket
import time
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS, MODELS
from mmengine.runner import load_checkpoint, save_checkpoint
from torch import nn

from bcn_mm import BCN
from bcn_mm.engine.cli import (
    _RANKS,
    AtomicLocalBackend,
    InputError,
    _prepare_launch,
    add_arguments,
    build_runner,
    check_match,
    find_newest_checkpoint,
    forget_pretrained,
    load_config,
    one_line_errors,
    read_checkpoint,
    refuse_code,
)


class Evil:
    """What a stranger's checkpoint may hold."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save(path, value):
    torch.save(value, path)
    return str(path)


def test_mmengine_checkpoints_load_weights_only(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    state = dict(
        state_dict=BCN(4, 2).state_dict(),
        message_hub=dict(
            log_scalars=collections.OrderedDict(loss=history),
            runtime_info=dict(lr=np.float64(0.1), step=np.int64(3)),
            array=np.arange(3.0),
        ),
    )
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray]):
        pass  # the fork of mmengine does so, and none of them is left
    loaded = read_checkpoint(save(tmp_path / 'a.pth', state))
    hub = loaded['message_hub']
    assert hub['log_scalars']['loss'].mean() == 1.5
    assert hub['runtime_info']['step'] == 3
    assert (hub['array'] == np.arange(3.0)).all()


@pytest.mark.parametrize(
    'value',
    [
        Evil(os.system, 'touch harmed'),
        Evil(eval, '1'),
        Evil(getattr, collections.OrderedDict, 'update'),
        Evil(getattr, HistoryBuffer, '__init__'),
        Evil(getattr, np.ndarray, 'tofile'),
        Evil(getattr, torch.Tensor, 'numpy'),
    ],
)
def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    path = save('evil.pth', dict(state_dict={}, extra=value))
    with pytest.raises(InputError, match='evil.pth.*was not loaded'):
        read_checkpoint(path)
    assert not (tmp_path / 'harmed').exists()


def test_mmengine_refuses_code_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save('evil.pth', dict(extra=Evil(os.system, 'touch harmed')))
    refuse_code()
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(BCN(4, 2), path)
    assert not (tmp_path / 'harmed').exists()


@pytest.mark.parametrize('keep', [0, 10, 400, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / 'a.pth'
    save(path, dict(state_dict=BCN(64).state_dict()))
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep > 1 else int(keep * len(data))])
    with pytest.raises(InputError, match='a.pth is (truncated|damaged)'):
        read_checkpoint(str(path))


def test_other_files(tmp_path):
    with pytest.raises(InputError, match='none.pth does not exist'):
        read_checkpoint(str(tmp_path / 'none.pth'))
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(InputError, match='text.pth'):
        read_checkpoint(str(tmp_path / 'text.pth'))
    with pytest.raises(InputError, match='no state dict but a list'):
        read_checkpoint(save(tmp_path / 'list.pth', [1]))
    with pytest.raises(InputError):
        (tmp_path / 'pickle.pth').write_bytes(pickle.dumps(Evil(os.getcwd)))
        read_checkpoint(str(tmp_path / 'pickle.pth'))
    state = BCN(4, 2).state_dict()
    assert (
        read_checkpoint(save(tmp_path / 'bare.pth', state))[
            'state_dict'
        ].keys()
        == state.keys()
    )


def test_check_match():
    def net(*widths):
        return nn.Sequential(*(nn.Linear(w, 4) for w in widths))

    def given(*widths):
        return dict(state_dict=net(*widths).state_dict())

    check_match(net(1, 2), given(1, 2), 'x')
    module = {f'module.{k}': v for k, v in net(1).state_dict().items()}
    check_match(net(1), dict(state_dict=module), 'x')
    for widths, message in (
        ((1, 3), r"3 of the model's 4 .* 4 in the file.*1.weight .*\(4, 2\)"),
        ((1,), r'2 of .* 4 .* 2 in the file.*1.weight .*file: absent'),
        ((1, 2, 5), r'4 of .* 4 .* 6 in the file.*2.weight .*model: absent'),
    ):
        with pytest.raises(InputError, match=message):
            check_match(net(1, 2), given(*widths), 'x')


def given(path, **options):
    """What the tools' parsers make of a command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_arguments(parser)
    args = parser.parse_args([str(path)])
    args.cfg_options = options
    return args


def test_load_config(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('a = dict(b=1, c=[1, 2])')
    cfg = load_config(given(path, **{'a.b': 2}))
    assert cfg.a.b == 2 and cfg.work_dir == os.path.join('work_dirs', 'c')
    with pytest.raises(InputError, match='none.py does not exist'):
        load_config(given(tmp_path / 'none.py'))
    with pytest.raises(InputError, match='--cfg-options'):
        load_config(given(path, **{'a.c.7': 2}))
    path.write_text('a = dict(')
    with pytest.raises(InputError, match='c.py cannot be read.*SyntaxError'):
        load_config(given(path))


def test_one_line_errors(capsys, monkeypatch):
    for error, text in (
        (InputError('two\nlines'), 'error: two lines ('),
        (KeyError('name'), 'error: KeyError: name ('),
        (TypeError('bad'), 'error: TypeError: bad ('),
    ):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise error
        out = capsys.readouterr()
        assert stop.value.code == 1
        assert out.err.startswith(text) and out.err.count('\n') == 1
    monkeypatch.setenv('BCN_MM_TRACEBACK', '1')
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError('name')


@pytest.fixture(params=[False, True], ids=['CPU', 'CUDA'])
def cuda(request, monkeypatch):
    """Whether there seems to be a GPU; and an environment of this test's."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: request.param)
    names = [*sum(_RANKS.values(), ()), 'MASTER_ADDR', 'MASTER_PORT']
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
    os.environ.update(dict.fromkeys(_RANKS[launcher], '0'))
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
            given = dict(zip(_RANKS[launcher], given))
            given.update(LOCAL_RANK='0', MASTER_ADDR='a.host')
            with mock.patch.dict(os.environ, given):
                os.environ.pop('MASTER_PORT', None)
                if port:
                    os.environ['MASTER_PORT'] = port
                _prepare_launch(Config(dict(launcher=launcher)))
                said = [os.environ[name] for name in _RANKS['pytorch']]
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
    environment = dict.fromkeys((*_RANKS['pytorch'], 'MASTER_ADDR'), '0')
    with mock.patch.dict(os.environ, environment):
        for strategy in (None, 'DDPStrategy'):
            cfg = dict(launcher='pytorch', model_wrapper_cfg=dict(wrapper))
            if strategy:
                own = dict(model_wrapper=cfg.pop('model_wrapper_cfg'))
                cfg.update(strategy=dict(type=strategy, **own))
            cfg = Config(cfg)
            _prepare_launch(cfg)
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
            _prepare_launch(cfg)  # nothing to say where a user says nothing
            assert 'model_wrapper_cfg' not in cfg


@MODELS.register_module()
class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BCN(4)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.norm(self.conv(inputs)).mean())


def launch(rank, port, folder):
    os.environ.update(zip(_RANKS['mpi'], map(str, (rank, 2, rank))))
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
    torch.multiprocessing.spawn(launch, (port, str(tmp_path)), nprocs=2)
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
    path = str(tmp_path / 'epoch_1.pth')
    chance, drafts = random.Random(0), 0
    for _ in range(20):
        process = multiprocessing.get_context('fork').Process(
            target=save_for_ever, args=(path,)
        )
        process.start()
        time.sleep(0.15 + 0.2 * chance.random())
        process.kill()
        process.join()
        draft = tmp_path / 'epoch_1.pth.part'
        drafts += draft.exists()
        draft.unlink(missing_ok=True)
        if os.path.exists(path):
            weight = read_checkpoint(path)['state_dict']['weight']
            assert (weight == weight[0]).all()
    assert os.path.exists(path) and drafts > 0  # some were half-way


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
    named.write_text('elsewhere.pth')
    assert find_newest_checkpoint(str(tmp_path)) == 'elsewhere.pth'


def test_forget_pretrained():
    """Wherever a config keeps them, and nothing else."""
    load = dict(type='Pretrained', checkpoint='a.pth')
    other = dict(type='Kaiming', layer='Conv2d')
    model = ConfigDict(
        pretrained='b.pth',
        backbone=dict(depth=18, init_cfg=load, parts=[dict(init_cfg=load)]),
        neck=dict(init_cfg=[other, load]),
        head=dict(init_cfg=other),
    )
    forget_pretrained(model)
    assert model.to_dict() == dict(
        backbone=dict(depth=18, init_cfg=None, parts=[dict(init_cfg=None)]),
        neck=dict(init_cfg=[other]),
        head=dict(init_cfg=other),
    )
