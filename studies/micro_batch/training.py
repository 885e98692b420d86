"""Runs that are not done yet, side by side in worker processes."""

import math
import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import List

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import children, records
from .tasks import TASKS, Run


def perform(
    runs: List[Run], folder: Path, workers: int, console: Console
) -> List[dict]:
    """Perform what is not done yet; returns the records of all runs.

    Args:
        runs (list[Run]): In the order in which they are begun.
        folder (Path): Where records and logs are, and go.
        workers (int): How many runs there are at a time.
        console (Console): Is told each run's result as it comes.
    """
    found = [records.known(run, folder) for run in runs]
    open_runs = [run for run, record in zip(runs, found) if not record]
    found = [record for record in found if record]
    if found:
        console.print(f'{len(found)} of {len(runs)} runs are done already')
    # of mmengine, about its use of pkg_resources, from every worker
    os.environ.setdefault('PYTHONWARNINGS', 'ignore::UserWarning')
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context('spawn'),
        _begin_worker,
    )
    bar = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        # between runs too
        speed_estimate_period=3600,
    )
    with bar:
        shown = bar.add_task('training', total=sum(map(cost, open_runs)))
        futures = {pool.submit(_work, run, folder): run for run in open_runs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                run, record = futures[future], future.result()
                found.append(record)
                bar.update(
                    shown,
                    advance=cost(run),
                    description=f'{count}/{len(open_runs)} runs',
                )
                what = (
                    f'{TASKS[run.task].error} {record["error"]:.2f}'
                    if record['error'] is not None
                    else f'[red]failed: {record["failed"]}'
                )
                console.print(
                    f'{run.task} {run.norm}, images {run.images}, rate '
                    f'{run.rate:g}, seed {run.seed}: {what} in '
                    f'{record["minutes"]:.1f} min'
                )
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def cost(run: Run) -> float:
    """About how many seconds a run takes."""
    return TASKS[run.task].cost(run)


def _work(run: Run, folder: Path) -> dict:
    """Train; a run that fails is recorded too, and tried again next time."""
    begun, record = time.monotonic(), dict(run._asdict(), commit=records.commit())
    try:
        record.update(TASKS[run.task].train(run, folder / 'logs' / run.name))
        if not math.isfinite(record['error']):
            raise ArithmeticError('the error is not finite')
    except Exception as e:
        record['error'] = None
        record['failed'] = ' '.join(str(e).split()) or type(e).__name__
    record['minutes'] = (time.monotonic() - begun) / 60
    records.keep(run, record, folder)
    return record


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent deals with it
    signal.signal(signal.SIGTERM, _end_worker)
    torch.set_num_threads(1)


def _end_worker(*_) -> None:
    children.kill()
    os._exit(1)
