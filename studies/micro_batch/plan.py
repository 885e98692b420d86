"""Which runs there are, and which of them come first."""

import argparse
from typing import Dict, List

from rich.console import Console

from .records import Key, by_key, chosen_by, known
from .tasks import TASKS, Run
from .training import cost, perform


def grid(args: argparse.Namespace) -> List[Run]:
    """What was asked for, of data that are prepared, the longest first."""
    runs = []
    for name in args.tasks:
        task = TASKS[name]
        extent = task.quick if args.quick else task.full
        pictures = task.pictures(args)
        held = pictures // task.holdout if args.rates and task.holdout else 0
        runs += [
            Run(
                name,
                norm,
                n,
                seed,
                args.epochs or extent.epochs,
                pictures - held,
                float(f'{rate * n**task.power:.3g}'),
                args.shift if task.shifts else 0,
                held,
            )
            for norm in args.norms or extent.norms
            for n in args.images or extent.images
            for rate in sorted(args.rates or [task.rate])
            for seed in range(args.seeds or extent.seeds)
        ]
    return sorted(runs, key=lambda run: (-cost(run), run.seed))


def promising(runs: List[Run], records: List[dict]) -> List[Run]:
    """Of further seeds, those at the two rates that were best with the first.

    Args:
        runs (list[Run]): Of further seeds.
        records (list[dict]): Of the first seed, at all rates.
    """
    best: Dict[Key, list] = {}
    for key, members in by_key(records).items():
        done = sorted((r for r in members if r['error'] is not None), key=chosen_by)
        best[key] = [r['rate'] for r in done[:2]]
    return [r for r in runs if r.rate in best.get((r.task, r.norm, r.images), ())]


def results(runs: List[Run], args: argparse.Namespace, console: Console) -> List[dict]:
    """The records of the runs; those that are not known are performed."""
    if args.show:
        return [r for r in (known(run, args.work_dir) for run in runs) if r]
    if len(args.rates or ()) < 2:
        return perform(runs, args.work_dir, args.workers, console)
    first = [run for run in runs if run.seed == 0]
    records = perform(first, args.work_dir, args.workers, console)
    further = promising([run for run in runs if run.seed], records)
    return records + perform(further, args.work_dir, args.workers, console)
