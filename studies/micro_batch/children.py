"""Trainings in processes of their own, which end with the worker."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, List

from studies import ROOT

_running: List[subprocess.Popen] = []

#: What a training says that ended for it.
DIVERGED = 'the loss is not finite'


class Diverged(ArithmeticError):
    """The loss of a training was not finite."""


def train(config: Path, folder: Path) -> dict:
    """Train and test (``child.py``) in one thread, with the bcn_mm beside it.

    Args:
        config (Path): What to train.
        folder (Path): The work directory, which is there; ``train.log`` in it
            is what was said.

    Returns:
        dict: The metrics.

    Raises:
        Diverged: if its loss was not finite.
        RuntimeError: if it failed.
    """
    with (folder / 'train.log').open('w') as log:
        failed = _run(config, folder, log)
    if failed:
        said = (folder / 'train.log').read_text()
        if DIVERGED in said:
            raise Diverged(DIVERGED)
        last = (said.strip().splitlines() or ['training failed'])[-1]
        raise RuntimeError(f'{last} (see {log.name})')
    return json.loads((folder / 'metrics.json').read_text())


def _run(config: Path, folder: Path, log: IO[str]) -> int:
    """The exit status of a training."""
    paths = [os.fspath(ROOT), os.environ.get('PYTHONPATH')]
    process = subprocess.Popen(
        [sys.executable, '-m', 'studies.micro_batch.child', config, folder],
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
    status = process.wait()
    _running.remove(process)
    return status


def kill() -> None:
    """End what is running."""
    for process in _running:
        process.kill()
