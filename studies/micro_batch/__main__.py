"""Error against images per step, for norms in the same small networks.

Trains a classifier of scikit-learn's digits, the quickstart's Mask R-CNN and
its DeepLabV3's backbone with a plain FCN head (DeepLab's image pooling has one
value per channel, which BN and IN refuse), each from scratch with every norm,
every number of images per step and every seed. All runs of a task see the same
number of images; those of digits are moved at random by up to a pixel. The
learning rate is the same for all norms; it grows with the images per step, on
shapes, where it is large already at one, with their square root. Runs that are
done are kept, so that the same command goes on where it was stopped, and a
larger one adds to it. On shapes, EliminationSingularityHook watches too: its
logs, for plot_singularity.py, are in WORK_DIR/logs, and "near" is the part of
the channels that was dead or near elimination at the end.

Norms: bn, ln (GroupNorm with one group), in, gn, gn-ws, bcn, bcn-ws. Arguments
of the layer may follow, as in bcn-ws,momentum=0.1,start=average; and on the
digits follow_lr=true, which scales BCN's momentum as the schedule scales the
learning rate.

The command is run in the folder of the repository.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import List

from rich.console import Console

from bcn_mm._files import write_json
from bcn_mm.engine.cli import one_line_errors
from bcn_mm.errors import InputError
from studies import ROOT

from .norms import NORMS, parse_norm
from .records import summarize, write_csv
from .report import draw, tables
from .tasks import TASKS, Run
from .training import cost, perform


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m studies.micro_batch',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='about 10 minutes on 2 cores: short schedules; all norms on '
        'digits with 2 seeds, three of them at one image per step on shapes',
    )
    parser.add_argument(
        '--tasks',
        nargs='+',
        choices=TASKS,
        default=list(TASKS),
        help='(all)',
    )
    parser.add_argument('--norms', nargs='+', metavar='NORM', help='(all)')
    parser.add_argument(
        '--images',
        nargs='+',
        type=int,
        metavar='N',
        help='images per step (1 2 4 8 16)',
    )
    parser.add_argument('--seeds', type=int, help='how many (3)')
    parser.add_argument('--epochs', type=int, help='of every run (digits 30, shapes 4)')
    parser.add_argument(
        '--shift',
        type=int,
        default=1,
        metavar='PIXELS',
        help='by how much the digits trained on are moved at most (%(default)s)',
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=os.cpu_count(),
        help='runs side by side, of one thread each (%(default)s)',
    )
    parser.add_argument(
        '--data',
        type=Path,
        default=ROOT / 'data' / 'shapes',
        help='where the pictures of shapes are or go (data/shapes)',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='where runs, results.json, results.csv and error.png go '
        '(work_dirs/micro_batch_study, with --quick ...-quick)',
    )
    args = parser.parse_args()
    name = 'micro_batch_study' + ('-quick' if args.quick else '')
    args.work_dir = (args.work_dir or ROOT / 'work_dirs' / name).resolve()
    args.data = args.data.resolve()
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Whatever can be refused before data are there."""
    counts = [args.workers, *(args.images or ())]
    counts += [n for n in (args.seeds, args.epochs) if n is not None]
    if min(counts) < 1:
        raise InputError('--images, --seeds, --epochs and --workers must be positive')
    if args.shift < 0:
        raise InputError('--shift must not be negative')
    following = all(TASKS[name].follows_lr for name in args.tasks)
    for norm in args.norms or ():
        if parse_norm(norm).follow_lr and not following:
            raise InputError(f'norm {norm!r}: follow_lr is for the digits')


def grid(args: argparse.Namespace) -> List[Run]:
    """What was asked for, of data that are prepared, the longest first."""
    runs = []
    for name in args.tasks:
        task = TASKS[name]
        extent = task.quick if args.quick else task.full
        pictures = task.pictures(args)
        runs += [
            Run(
                name,
                norm,
                n,
                seed,
                args.epochs or extent.epochs,
                pictures,
                task.rate * n**task.power,
                args.shift if task.shifts else 0,
            )
            for norm in args.norms or extent.norms
            for n in args.images or extent.images
            for seed in range(args.seeds or extent.seeds)
        ]
    return sorted(runs, key=lambda run: (-cost(run), run.seed))


def main() -> None:
    args = parse_args()
    console = Console()
    # ends the workers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: stopped'))
    with one_line_errors():
        check_arguments(args)
        for name, task in TASKS.items():
            if name in args.tasks:
                task.prepare(args)
        runs = grid(args)
        records = perform(runs, args.work_dir, args.workers, console)
        norms = list(dict.fromkeys(run.norm for run in runs))
        norms = [n for n in NORMS if n in norms] + [n for n in norms if n not in NORMS]
        rows = summarize(records)
        write_json(args.work_dir / 'results.json', records)
        write_csv(rows, args.work_dir / 'results.csv')
        draw(rows, norms, args.work_dir / 'error.png')
    for table in tables(rows, norms):
        console.print(table)
    console.print(f'picture   {args.work_dir / "error.png"}')
    console.print(f'results   {args.work_dir / "results.json"}, results.csv')
    failed = sum(row['failed'] for row in rows.values())
    if failed:
        sys.exit(f'error: {failed} runs failed; the same command tries again')


if __name__ == '__main__':
    main()
