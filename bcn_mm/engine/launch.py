"""The runner of a config, on every launcher, with GPUs or without."""

import atexit
import errno
import gc
import glob
import logging
import os
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Optional, Set, Union

import torch
from mmengine.config import Config, ConfigDict
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import MMLogger
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch.nn.parallel import DistributedDataParallel

from .._compat import refuse_code
from .._files import replacing
from ..convert import type_name
from ..errors import InputError

#: Launcher -> the environment variables in which it says which process this
#: is: its rank, the number of processes, its rank on its machine.
RANK_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
    ),
}
#: Launcher -> the command that starts processes for it.
_STARTERS = dict(pytorch='torchrun', slurm='srun', mpi='mpirun')


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written beside their target and moved there.

    A process that dies while it writes, or finds the disk full, leaves what
    was there before. So does one that makes room first: a checkpoint goes
    when the next one has been written.
    """

    #: checkpoints to remove
    _due: Set[str] = set()

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write ``obj`` to ``filepath``, whole or not at all.

        Raises:
            InputError: if the disk is full.
        """
        try:
            with replacing(filepath) as draft, open(draft, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f'disk full: {filepath} ({len(obj) >> 20} MB) was not written; '
                f'what was there before is kept: make room and start again, a '
                f'training with --resume'
            ) from e
        self._due.discard(os.path.abspath(filepath))
        while self._due:
            super().remove(self._due.pop())

    def remove(self, filepath: Union[str, Path]) -> None:
        """Remove a file; a checkpoint, with the next :meth:`put`."""
        if str(filepath).endswith('.pth') and os.path.isfile(filepath):
            self._due.add(os.path.abspath(filepath))
        else:
            super().remove(filepath)


def remove_drafts(work_dir: str) -> None:
    """Remove checkpoints half-written by processes that were killed."""
    for draft in glob.glob(os.path.join(glob.escape(work_dir), '*.pth.part')):
        os.remove(draft)


@contextmanager
def taken_back(work_dir: str, config: Optional[str]) -> Iterator[None]:
    """What a runner that could not start wrote is taken back.

    That is the folder of its logs, its copy of the config, and folders made
    for them.

    Args:
        work_dir (str): Of the runner.
        config (str, optional): Whose name the copy has.
    """
    work_dir = os.path.abspath(work_dir)
    new, parent = [], work_dir
    while not os.path.exists(parent):
        new.append(parent)
        parent = os.path.dirname(parent)
    copy = Path(work_dir, os.path.basename(config)) if config else None
    before = copy.read_bytes() if copy and copy.is_file() else None
    known = set(os.listdir(work_dir)) if os.path.isdir(work_dir) else set()
    try:
        yield
    except BaseException:
        logger = MMLogger.get_current_instance()
        for handler in list(logger.handlers):
            if not isinstance(handler, logging.FileHandler):
                continue  # and none on the ranks that write nothing
            home, name = os.path.split(os.path.dirname(handler.baseFilename))
            if home != work_dir or name in known:
                continue
            logger.removeHandler(handler)
            handler.close()
            shutil.rmtree(os.path.join(home, name))
            if copy and before is not None:
                copy.write_bytes(before)
            elif copy:
                with suppress(FileNotFoundError):
                    copy.unlink()
            with suppress(OSError):  # somebody else's files
                for folder in new:
                    os.rmdir(folder)
        raise


def find_newest_checkpoint(work_dir: str) -> Optional[str]:
    """The checkpoint that ``--resume`` goes on from, None if there is none.

    That is what mmengine's ``last_checkpoint`` names, or, where that is not there
    or a process died while it wrote that file, the ``*.pth`` that was written last.

    Args:
        work_dir (str): The work directory of the training.
    """
    source = find_latest_checkpoint(work_dir)
    gone = source and '://' not in source and not os.path.exists(source)
    if source == '' or gone:
        files = glob.glob(os.path.join(glob.escape(work_dir), '*.pth'))
        source = max(files, key=os.path.getmtime, default=source or None)
    return source


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, on a machine with GPUs or without.

    It writes checkpoints atomically and reads weights only from here on.

    Args:
        cfg (Config): Completed in place, see :func:`prepare_launch`.

    Raises:
        InputError: if the launcher did not start this process, or does not
            say where the process of rank 0 is.
    """
    refuse_code()
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
    prepare_launch(cfg)
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def prepare_launch(cfg: Config) -> None:
    """Let every launcher run, without a GPU on gloo.

    mmengine's launchers select a CUDA device unconditionally and its DDP
    wrapper names one; a process group that is already up is left alone.

    Args:
        cfg (Config): With ``launcher``; how it wraps the model is completed
            in place.

    Raises:
        InputError: as of :func:`build_runner`.
    """
    if cfg.launcher == 'none':
        return
    _set_rank_variables(cfg.launcher)
    if not torch.cuda.is_available():
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
            atexit.register(_destroy_gloo_group)
        if type_name(cfg.get('strategy')) == 'FSDPStrategy':
            _keep_fsdp_on_cpu(cfg.strategy)
        cfg.setdefault('model_wrapper_cfg', {})
        if _wraps_in_ddp(cfg.model_wrapper_cfg):
            cfg.model_wrapper_cfg.setdefault('device_ids', None)
            cfg.model_wrapper_cfg.setdefault(
                'find_unused_parameters',
                cfg.get('find_unused_parameters', False),
            )
    _keep_buffers_local(cfg)


def _set_rank_variables(launcher: str) -> None:
    """Say in the environment, as torchrun does, what the launcher says.

    mmengine reads it there, also where mpirun never wrote it: the GPU that
    DDP takes is ``LOCAL_RANK``.
    """
    starter, names = _STARTERS[launcher], RANK_VARIABLES[launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f'--launcher {launcher} is for {starter}, which sets '
            f'{" and ".join(missing)}; start the script with {starter}'
        )
    for own, given in zip(RANK_VARIABLES['pytorch'], names):
        os.environ[own] = os.environ[given]
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(launcher)


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


def _keep_buffers_local(cfg: Config) -> None:
    """Have a DDP of the user's leave every rank its own estimates.

    DDP broadcasts the first rank's buffers in every pass unless told not to;
    mmengine tells it where a config does not say how to wrap the model.
    """
    strategy = cfg.get('strategy') or {}
    wrappers = [cfg.get('model_wrapper_cfg')]
    if type_name(strategy) == 'DDPStrategy':
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


def _destroy_gloo_group() -> None:
    """End gloo's threads, which abort an interpreter that they outlive.

    A group ends with its last reference; models hold some, in cycles.
    """
    torch.distributed.destroy_process_group()
    gc.collect()


def _keep_fsdp_on_cpu(strategy: ConfigDict) -> None:
    """Say to torch's FSDP what it takes to stay off accelerators."""
    strategy.setdefault('model_wrapper', {})
    strategy.model_wrapper.setdefault('type', 'MMFullyShardedDataParallel')
    strategy.model_wrapper.setdefault('device_id', 'cpu')
    if strategy.get('state_dict_cfg') == 'full':
        # to offload what is on the CPU already crashes torch (2.13)
        in_place = dict(rank0_only=False, offload_to_cpu=False)
        strategy.state_dict_cfg = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **in_place),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', **in_place),
        )
