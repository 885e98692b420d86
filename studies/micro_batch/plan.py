"""Which runs there are, and which of them come first."""

import argparse
from typing import Dict, List

from rich.console import Console

from .records import Key, by_key, chosen_by, known, rates_of
from .tasks import TASKS, Run
from .training import cost, perform

#: How often rates are added beyond those that were asked for, at most.
EXTENSIONS = 3


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
    # what is asked for twice is not a second seed
    return sorted(dict.fromkeys(runs), key=lambda run: (-cost(run), run.seed))


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


def beyond(runs: List[Run], records: List[dict]) -> List[Run]:
    """A rate more for every norm whose best one is the lowest or highest tried.

    It is as far from that one as the rate on its other side. Not among them is what
    is tried already, and failed.

    Args:
        runs (list[Run]): Of the first seed.
        records (list[dict]): What they gave.
    """
    more = []
    for key, members in by_key(records).items():
        done = [r for r in members if r['error'] is not None]
        rates = sorted({r['rate'] for r in done})
        if len(rates) < 2:
            continue
        best, _ = rates_of(done)
        for end, beside in (rates[:2], rates[:-3:-1]):
            if best == end:
                like = next(r for r in runs if (r.task, r.norm, r.images) == key)
                more.append(like._replace(rate=float(f'{end * end / beside:.3g}')))
    return [run for run in more if run not in runs]


def results(runs: List[Run], args: argparse.Namespace, console: Console) -> List[dict]:
    """The records of the runs; those that are not known are performed."""

    def done(runs: List[Run]) -> List[dict]:
        if args.show:
            return [r for r in (known(run, args.work_dir) for run in runs) if r]
        return perform(runs, args.work_dir, args.workers, console)

    if len(args.rates or ()) < 2:
        return done(runs)
    first = [run for run in runs if run.seed == 0]
    records = done(first)
    further = [run for run in runs if run.seed]
    for _ in range(EXTENSIONS if args.extend else 0):
        more = beyond(first, records)
        if not more:
            break
        first += more
        records += done(more)
        for run in more:
            seeds = {r.seed for r in further if r.task == run.task}
            further += [run._replace(seed=seed) for seed in sorted(seeds)]
    return records + done(further if args.show else promising(further, records))
