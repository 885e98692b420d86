"""Trainings in processes of their own, which end with the worker."""

import os
import subprocess
import sys
from pathlib import Path
from typing import List

from studies import ROOT

_running: List[subprocess.Popen] = []


def train(config: Path, folder: Path) -> None:
    """Train by ``tools/train.py`` in one thread, with the bcn_mm beside it.

    Args:
        config (Path): What to train.
        folder (Path): The work directory, which is there; ``train.log`` in it
            is what was said.

    Raises:
        RuntimeError: if it failed.
    """
    paths = [os.fspath(ROOT), os.environ.get('PYTHONPATH')]
    with (folder / 'train.log').open('w') as log:
        process = subprocess.Popen(
            [sys.executable, 'tools/train.py', config, '--work-dir', folder],
            cwd=ROOT,
            env={
                **os.environ,
                'OMP_NUM_THREADS': '1',
                'PYTHONPATH': os.pathsep.join(filter(None, paths)),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _running.append(process)
        if process.wait():
            raise RuntimeError(f'training failed, see {log.name}')
        _running.remove(process)


def kill() -> None:
    """End what is running."""
    for process in _running:
        process.kill()
