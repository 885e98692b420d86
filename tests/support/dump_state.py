"""What training starts from and ends with, for tests of the commands."""

import atexit
import os
import re
from pathlib import Path

import torch
from mmengine.config import config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS

if 'RANK' in os.environ:
    # what a config looks like in files and logs takes longer than a step
    config.FormatCode = lambda text, **_: (text, True)


@HOOKS.register_module()
class DumpState(Hook):
    def __init__(self, path):
        self.path = path

    def before_train(self, runner):
        torch.save(
            dict(
                model=runner.model.state_dict(),
                optimizer=runner.optim_wrapper.state_dict(),
                iter=runner.iter,
            ),
            self.path,
        )


def dumping(base: Path, folder: Path) -> Path:
    """A config like ``base`` that dumps to ``start.pth`` in ``folder``."""
    config = folder / 'dumping.py'
    config.write_text(
        f"_base_ = '{base}'\n"
        "custom_imports = dict(imports=['bcn_mm', 'support.dump_state'])\n"
        "custom_hooks = [dict(type='DumpState', "
        f"path='{folder / 'start.pth'}')]\n"
    )
    return config


def check_dump(folder: Path, checkpoint: Path, iteration: int) -> None:
    """Assert that training started from exactly that checkpoint."""
    saved, start = torch.load(checkpoint), torch.load(folder / 'start.pth')
    assert start['iter'] == iteration
    assert saved['state_dict'].keys() == start['model'].keys()
    for name, value in saved['state_dict'].items():
        assert torch.equal(value, start['model'][name]), name
    buffers = saved['optimizer']['state']
    assert buffers.keys() == start['optimizer']['state'].keys()
    for key, value in buffers.items():
        begun = start['optimizer']['state'][key]
        assert torch.equal(value['momentum_buffer'], begun['momentum_buffer'])


@HOOKS.register_module()
class DumpRanks(Hook):
    """What each rank holds once training and validation are over."""

    priority = 'VERY_LOW'

    def __init__(self, folder):
        self.folder = folder

    def after_train(self, runner):
        torch.save(
            getattr(runner.model, 'module', runner.model).state_dict(),
            f'{self.folder}/rank{runner.rank}.pth',
        )


@DATA_SAMPLERS.register_module()
class UnevenSampler(DefaultSampler):
    """Gives every rank one sample less than the one before."""

    def __iter__(self):
        return iter(list(super().__iter__())[: len(self)])

    def __len__(self):
        return self.num_samples - self.rank


@atexit.register
def name_threads() -> None:
    """Print the threads that outlive all else, where the system lists them.

    Configs are read before a process group starts, so that this comes last.
    """
    folder = Path('/proc/self/task')
    if 'RANK' in os.environ and folder.is_dir():
        names = sorted((f / 'comm').read_text().strip() for f in folder.iterdir())
        print('threads at exit:', *names, flush=True)


def check_threads(output: str) -> None:
    """Assert that gloo's threads, which can abort a process, are gone."""
    assert 'threads at exit:' in output or not os.path.isdir('/proc/self/task')
    assert not re.findall('threads at exit:.*gloo.*', output)
