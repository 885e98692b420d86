"""What the tools share, and what the stack underneath needs in order to run.

Importing ``bcn_mm`` calls :func:`allow_mmengine_checkpoints`, so that stock
tools which import it through ``custom_imports`` read their own checkpoints,
and :func:`offer_configs`.
"""

import argparse
import atexit
import gc
import glob
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from typing import Iterator, List, Optional, Tuple

import cv2
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner import checkpoint as reading
from torch.nn.parallel import DistributedDataParallel

from ..weights.authors import check_finite

_STATISTICS = ('min', 'max', 'current', 'mean', 'statistics')


def _history_statistic(owner: object, name: str):
    """Stands in for ``getattr`` in checkpoints, where mmengine's
    ``HistoryBuffer`` pickles its own methods by name; anything else that a
    file asks it for is refused."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'a checkpoint may not read the attribute {name!r} of {owner!r}'
    )


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's checkpoints.

    They hold log histories and numpy scalars beside the weights. Only these
    data types are allow-listed, under the names that numpy 1 and 2 write.
    """
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return  # an older torch, whose default is to load everything
    multiarray = getattr(np, '_core', None) or np.core
    multiarray = multiarray.multiarray
    allowed = [HistoryBuffer, np.ndarray, np.dtype]
    allowed.append((_history_statistic, 'builtins.getattr'))
    for name in ('scalar', '_reconstruct'):
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            allowed.append((getattr(multiarray, name), f'{module}.{name}'))
    allowed += {type(np.dtype(code)) for code in '?bBhHiIlLqQefdFDU'}
    torch.serialization.add_safe_globals(allowed)


def refuse_code() -> None:
    """Let mmengine read checkpoints weights only, in the stack's fork too.

    The fork tries that, with ``getattr`` of anything allowed, and where it
    fails it runs what the file holds.
    """
    if hasattr(reading, '_safe_torch_load'):
        reading._safe_torch_load = partial(torch.load, weights_only=True)


def offer_configs() -> None:
    """Let ``bcn_mm::FOLDER/NAME.py`` name the configs that come with bcn_mm.

    As ``mmdet::FOLDER/NAME.py`` does for mmdet's, in ``_base_`` and in
    ``mmengine.hub.get_config``, however bcn_mm was installed. In the fork of
    the stack, this makes mmengine find ``mmseg::`` too.
    """
    if 'bcn_mm' in MODULE2PACKAGE:
        return
    # a module's name: mmengine finds its folder, but not that of a
    # distribution which is installed as editable
    MODULE2PACKAGE['bcn_mm'] = 'bcn_mm.version'
    # not the distribution mmsegmentation, which is onedl-mmsegmentation there
    if importlib.util.find_spec('mmseg'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'
    find = Config._get_cfg_path

    def find_config(path: str, filename: str):
        """Without the scope 'bcn_mm', which mmengine would make up for it:
        everything here is registered in the root, and a config's pipeline is
        to be built in the scope of the config that uses it."""
        found, scope = find(path, filename)
        return found, None if scope == 'bcn_mm' else scope

    Config._get_cfg_path = staticmethod(find_config)


class InputError(Exception):
    """Something that the user gave is wrong; the message says what to do."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr and exit status 1.

    For the part of a program that depends on what its user gave: arguments,
    config, files. ``BCN_MM_TRACEBACK=1`` shows the whole traceback instead.
    """
    try:
        yield
    except Exception as e:
        if os.environ.get('BCN_MM_TRACEBACK'):
            raise
        text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        text = ' '.join(text.split()) or type(e).__name__
        if not isinstance(e, (InputError, ValueError, FileNotFoundError)):
            text = f'{type(e).__name__}: {text}'
        # straight to the descriptor: loggers may hold the streams
        sys.stderr.flush()
        print(
            f'error: {text} (BCN_MM_TRACEBACK=1 shows where)', file=sys.stderr
        )
        sys.exit(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument(
        '--work-dir',
        help="where logs and results go (default: the config's, else "
        'work_dirs/NAME_OF_THE_CONFIG)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. model.backbone.depth=101 '
        'or model.neck.in_channels="[1,2,3]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started this process (%(default)s)',
    )
    # handed over by launchers that do not set the environment variable
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and merge the shared arguments into it.

    Raises:
        InputError: if the file is missing, does not parse, or an option does
            not fit it.
    """
    path = args.config
    if not os.path.isfile(path):
        raise InputError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(path)
    except Exception as e:
        raise InputError(
            f'config {path} cannot be read: {type(e).__name__}: {e}'
        ) from e
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except Exception as e:
        raise InputError(f'--cfg-options do not fit {path}: {e}') from e
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir or not cfg.get('work_dir'):
        name = os.path.splitext(os.path.basename(path))[0]
        cfg.work_dir = args.work_dir or os.path.join('work_dirs', name)
    return cfg


def read_checkpoint(path: str) -> dict:
    """Read a local checkpoint on the CPU, weights only.

    Returns:
        dict: the checkpoint; its ``state_dict`` is always present.

    Raises:
        InputError: if the file is missing, truncated, holds anything but
            data, holds no state dict, or one with numbers that are not finite.
    """
    if not os.path.isfile(path):
        raise InputError(f'checkpoint {path} does not exist')
    # again: torch's safe_globals(), where somebody used it, took them back
    allow_mmengine_checkpoints()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r'GLOBAL ([\w.]+)|attribute .*', str(e))
        what = f' ({found.group(0)})' if found else ''
        raise InputError(
            f'checkpoint {path} is damaged or holds more than weights{what} '
            f'and was not loaded'
        ) from e
    except Exception as e:  # a damaged pickle may raise almost anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(
            f'checkpoint {path} is truncated or no checkpoint: {reason}'
        ) from e
    if not isinstance(checkpoint, dict):
        raise InputError(
            f'checkpoint {path} holds no state dict but a '
            f'{type(checkpoint).__name__}'
        )
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    state = checkpoint['state_dict']
    for name, value in state.items() if isinstance(state, dict) else ():
        try:
            check_finite(name, value)
        except ValueError as e:
            raise InputError(f'checkpoint {path}: {e}') from e
    return checkpoint


def check_match(model: torch.nn.Module, checkpoint: dict, path: str) -> None:
    """Make sure that a checkpoint is one of exactly this model.

    mmengine loads what fits and goes on with the rest as initialized, which
    makes test metrics of a wrong pair of files look like a bad model.

    Raises:
        InputError: says how much matched, and the first tensor that did not.
    """

    def shapes(state):
        return {
            re.sub(r'^module\.', '', k): tuple(getattr(v, 'shape', ()))
            for k, v in state.items()
            if 'num_batches_tracked' not in k
        }

    own, given = shapes(model.state_dict()), shapes(checkpoint['state_dict'])
    matched = sum(given.get(k) == shape for k, shape in own.items())
    if matched == len(own) == len(given):
        return
    name = next(k for k in (*own, *given) if own.get(k) != given.get(k))
    raise InputError(
        f'checkpoint {path} is of another architecture: {matched} of the '
        f"model's {len(own)} tensors match, out of {len(given)} in the file; "
        f'the first that does not is {name} (model: '
        f'{own.get(name, "absent")}, file: {given.get(name, "absent")})'
    )


# What their checkpoints are called here once converted -> what they call them.
_AUTHORS = {
    f'{name}_mm.pth': f'{name}.pth'
    for name in ('rn50_bcn_ws', 'rn101_bcn_ws', 'rx50_bcn_ws')
}
_SITE = 'github.com/joe-siyuan-qiao/Batch-Channel-Normalization'


def check_pretrained(cfg: Config) -> None:
    """Make sure that the files are there which a model is to start from.

    mmengine looks for them when it initializes weights, after everything else
    has been built.

    Raises:
        InputError: if a local one is missing, says how to get it and how to
            do without; if it cannot be read or holds numbers that are not
            finite, says so.
    """
    for name, node in _dicts(cfg.get('model') or {}, 'model'):
        path = node.get('checkpoint')
        if node.get('type') != 'Pretrained' or '://' in str(path):
            continue
        if os.path.isfile(path):
            read_checkpoint(path)
            continue
        source = _AUTHORS.get(os.path.basename(path))
        get = (
            f'get {source} from {_SITE} and convert it (python tools/'
            f'model_converters/authors_to_mm.py {source} {path}), or '
            if source
            else ''
        )
        raise InputError(
            f'{name}: checkpoint {path} does not exist; {get}start from '
            f'random weights (--cfg-options {name}=None)'
        )


def forget_pretrained(model: dict) -> None:
    """Have a model's config start from random weights, in place."""
    for _, node in _dicts(model, ''):
        node.pop('pretrained', None)
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [e for e in init_cfg if 'checkpoint' not in e]
        elif 'checkpoint' in (init_cfg or ()):
            node['init_cfg'] = None


def _dicts(node: object, name: str) -> Iterator[Tuple[str, dict]]:
    """All dicts in a part of a config, with their names in it."""
    if isinstance(node, dict):
        yield name, node
        items = node.items()
    else:
        items = enumerate(node if isinstance(node, (list, tuple)) else ())
    for key, value in items:
        yield from _dicts(value, f'{name}.{key}')


def _first_host(launcher: str) -> str:
    """The machine of rank 0, if the launcher says it."""
    nodes = os.environ.get('SLURM_JOB_NODELIST')
    if launcher != 'slurm' or not nodes:
        raise InputError(
            f'--launcher {launcher}: set MASTER_ADDR to the address of the '
            f'machine of rank 0'
        )
    hosts = subprocess.run(
        ['scontrol', 'show', 'hostnames', nodes],
        check=True,
        capture_output=True,
        text=True,
    )
    return hosts.stdout.split()[0]


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written beside their target and moved there.

    A process that dies while it writes leaves what was there before.
    """

    def put(self, obj: bytes, filepath) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(filepath)), exist_ok=True)
        draft = f'{filepath}.part'
        with open(draft, 'wb') as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, filepath)


def find_newest_checkpoint(work_dir: str) -> Optional[str]:
    """The checkpoint that ``--resume`` goes on from, None if there is none.

    That is what mmengine's ``last_checkpoint`` names, or, where a process
    died while it wrote that file, the ``*.pth`` that was written last.
    """
    source = find_latest_checkpoint(work_dir)
    if source == '':
        files = glob.glob(os.path.join(glob.escape(work_dir), '*.pth'))
        source = max(files, key=os.path.getmtime, default=None)
    return source


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, on a machine with GPUs or without.

    It writes checkpoints atomically and reads weights only from here on.
    """
    refuse_code()
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
    _prepare_launch(cfg)
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


# Where launchers say which process this is: rank, number, rank on its machine.
_RANKS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
}
_STARTERS = dict(pytorch='torchrun', slurm='srun', mpi='mpirun')


def _prepare_launch(cfg: Config) -> None:
    """Let every launcher run, without a GPU on gloo.

    mmengine's launchers select a CUDA device unconditionally and its DDP
    wrapper names one; a process group that is already up is left alone.
    """
    if cfg.launcher == 'none':
        return
    _say_which_rank(cfg.launcher)
    if not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        atexit.register(_leave_gloo)
        if (cfg.get('strategy') or {}).get('type') == 'FSDPStrategy':
            _keep_fsdp_on_cpu(cfg.strategy)
        cfg.setdefault('model_wrapper_cfg', {})
        if _wraps_in_ddp(cfg.model_wrapper_cfg):
            cfg.model_wrapper_cfg.setdefault('device_ids', None)
            cfg.model_wrapper_cfg.setdefault(
                'find_unused_parameters',
                cfg.get('find_unused_parameters', False),
            )
    _keep_own_estimates(cfg)


def _say_which_rank(launcher: str) -> None:
    """Say in the environment, as torchrun does, what the launcher says.

    mmengine reads it there, also where mpirun never wrote it: the GPU that
    DDP takes is ``LOCAL_RANK``.
    """
    starter, names = _STARTERS[launcher], _RANKS[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f'--launcher {launcher} is for {starter}, which sets '
            f'{" and ".join(missing)}; start the script with {starter}'
        )
    for own, given in zip(_RANKS['pytorch'], names):
        os.environ[own] = os.environ[given]
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(launcher)


def _keep_own_estimates(cfg: Config) -> None:
    """Have a DDP of the user's leave every rank its own estimates.

    DDP broadcasts the first rank's buffers in every pass unless told not to;
    mmengine tells it where a config does not say how to wrap the model.
    """
    strategy = cfg.get('strategy') or {}
    wrappers = [cfg.get('model_wrapper_cfg')]
    if strategy.get('type') == 'DDPStrategy':
        wrappers.append(strategy.get('model_wrapper'))
    for wrapper in wrappers:
        # a newer name of the same setting is an answer, too
        if (
            wrapper is not None
            and _wraps_in_ddp(wrapper)
            and 'forward_sync_buffers' not in wrapper
        ):
            wrapper.setdefault('broadcast_buffers', False)


def _wraps_in_ddp(wrapper: dict) -> bool:
    kind = wrapper.get('type', 'MMDistributedDataParallel')
    if isinstance(kind, str):
        # not .get(), which logs, and so asks which rank this is, too early
        kind = MODEL_WRAPPERS.module_dict.get(kind.rpartition('.')[2])
    return kind is not None and issubclass(kind, DistributedDataParallel)


def _leave_gloo() -> None:
    """End gloo's threads, which abort an interpreter that they outlive.

    A group ends with its last reference; models hold some, in cycles.
    """
    torch.distributed.destroy_process_group()
    gc.collect()


def _keep_fsdp_on_cpu(strategy: dict) -> None:
    """Say to torch's FSDP what it takes to stay off accelerators."""
    strategy.setdefault('model_wrapper', {})
    strategy.model_wrapper.setdefault('type', 'MMFullyShardedDataParallel')
    strategy.model_wrapper.setdefault('device_id', 'cpu')
    if strategy.get('state_dict_cfg') == 'full':
        # to offload what is on the CPU already crashes torch (2.13)
        stay = dict(rank0_only=False, offload_to_cpu=False)
        strategy.state_dict_cfg = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **stay),
            optim_state_dict_config=dict(
                type='FullOptimStateDictConfig', **stay
            ),
        )


def find_pictures(path: str) -> List[str]:
    """The picture files that a path names: itself, or those in a folder.

    Returns:
        list[str]: sorted by name; never empty.

    Raises:
        InputError: if there is no such file or folder, or no picture in it.
    """
    if os.path.isdir(path):
        found = [
            os.path.join(path, name)
            for name in sorted(os.listdir(path))
            if name.lower().endswith(_PICTURES)
        ]
        if not found:
            raise InputError(f'no pictures ({", ".join(_PICTURES)}) in {path}')
        return found
    if not os.path.isfile(path):
        raise InputError(f'there is no picture or folder {path}')
    return [path]


_PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def check_picture(path: str) -> None:
    """Raise an InputError if a file cannot be decoded as a picture."""
    with open(path, 'rb') as file:
        data = np.frombuffer(file.read(), np.uint8)
    if not data.size or cv2.imdecode(data, cv2.IMREAD_COLOR) is None:
        raise InputError(f'{path} is damaged or no picture')
