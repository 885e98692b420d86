"""Error against images per step, for norms in the same small networks.

Tasks, each trained with every norm, every number of images per step and every
seed:

  digits      a classifier of scikit-learn's digits
  det, seg    the quickstart's Mask R-CNN, and its DeepLabV3's backbone with a
              plain FCN head, on its shapes
  street      the quickstart's DeepLabV3 at output stride 16 on street scenes in
              Cityscapes' layout, of which 480x360 is enough; BN has GN in its
              head, whose image pooling has one value per channel
  photos      the quickstart's Mask R-CNN on photographs in COCO's layout, and its
              box AP on these very pictures: who optimizes
  bn-weights, bn-weights-small, det-bn-weights
              EfficientNet-Lite0 with BatchNorm's ImageNet weights, norms in the
              place of its BatchNorms: below an FCN head on the street scenes, at
              output stride 16, or on crops of 96x96 at 32, whose last maps have
              nine positions, tested in windows of that size; and below a Mask
              R-CNN's neck and heads on the shapes

All runs of a task see the same number of images, up to whole steps a pass; those
of digits are moved at random by up to a pixel. Runs that are done are kept, so that
the same command goes on where it was stopped, and a larger one adds to it.

The learning rate is the task's. With --rates every norm has its best of these:
the one with the lowest error on a sixth of the training pictures that is held
out for that. The first seed tries all rates, the others the two that were
best with it. With --extend a norm whose best rate is the lowest or highest tried
gets another beyond it, three times at most. Rates are those at one image per step;
they grow with the square root of the images, those of the digits with their number.

EliminationSingularityHook watches all but the digits: its logs, for
plot_singularity.py, are in WORK_DIR/logs, and "near" is the part of the channels
that was dead or near elimination at the end.

Norms: bn, ln (GroupNorm with one group), in, gn, gn-ws, bcn, bcn-ws; for those
of weights bn-frozen, bn-trained, gn-placed, bcn-read, bcn-random. Arguments of the
layer may follow, as in bcn-ws,momentum=0.1,start=average. So may, on the digits,
follow_lr=true, which scales BCN's momentum as the schedule scales the learning
rate; and with those of weights frozen=true (what leads to output stride 4),
reading=plain (the channel stage begins with weight 1 and bias 0) and warmup=N
(forward passes before the first step); and on street scenes windows=true or false
(whether pictures are tested in windows as large as the crops).

The command is run in the folder of the repository.
"""

import argparse
import math
import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from bcn_mm._files import replacing, write_json
from bcn_mm.engine.cli import one_line_errors
from bcn_mm.errors import InputError
from studies import ROOT

from .norms import NAMES, parse_norm
from .plan import grid, results
from .records import summarize, write_csv, write_runs
from .report import draw, draw_curves, draw_predictions, markdown, tables
from .tasks import TASKS


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
        default=['digits', 'det', 'seg'],
        help='(digits det seg)',
    )
    parser.add_argument('--norms', nargs='+', metavar='NORM', help="(all of a task's)")
    parser.add_argument(
        '--images',
        nargs='+',
        type=int,
        metavar='N',
        help='images per step (digits, det and seg 1 2 4 8 16; others 1)',
    )
    parser.add_argument(
        '--rates',
        nargs='+',
        type=float,
        metavar='RATE',
        help="learning rates to choose from, at one image per step (the task's)",
    )
    parser.add_argument(
        '--extend',
        action='store_true',
        help='try rates beyond the lowest or highest, where that is the best one',
    )
    parser.add_argument('--seeds', type=int, help='how many (3)')
    parser.add_argument(
        '--epochs',
        type=int,
        help='of every run (digits 30, det and seg 4, street 16, photos 72, '
        'bn-weights 8, bn-weights-small 16, det-bn-weights 2)',
    )
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
        '--street-data',
        type=Path,
        default=ROOT / 'data' / 'cityscapes',
        help='where the street scenes are (data/cityscapes)',
    )
    parser.add_argument(
        '--photo-data',
        type=Path,
        default=ROOT / 'data' / 'coco',
        help='where the photographs are (data/coco)',
    )
    parser.add_argument(
        '--show',
        action='store_true',
        help='train nothing: the tables of what is done',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='where runs, results.json, .csv and .md, runs.csv and pictures go '
        '(work_dirs/micro_batch_study, with --quick ...-quick)',
    )
    args = parser.parse_args()
    name = 'micro_batch_study' + ('-quick' if args.quick else '')
    args.work_dir = (args.work_dir or ROOT / 'work_dirs' / name).resolve()
    for key in ('data', 'street_data', 'photo_data'):
        setattr(args, key, getattr(args, key).resolve())
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Whatever can be refused before data are there."""
    counts = [args.workers, *(args.images or ())]
    counts += [n for n in (args.seeds, args.epochs) if n is not None]
    if min(counts) < 1:
        raise InputError('--images, --seeds, --epochs and --workers must be positive')
    if args.shift < 0:
        raise InputError('--shift must not be negative')
    if not all(0 < rate < math.inf for rate in args.rates or ()):
        raise InputError('--rates must be positive numbers')
    if args.extend and len(set(args.rates or ())) < 2:
        raise InputError('--extend is for two --rates or more')
    for name in args.norms or ():
        norm = parse_norm(name)
        for task in (TASKS[task] for task in args.tasks):
            if name.split(',')[0] not in task.norms:
                raise InputError(
                    f'norm {name!r} is none of {task.name}, whose are '
                    f'{", ".join(task.norms)}'
                )
            for key in norm.settings:
                if key not in task.settings:
                    able = [t.name for t in TASKS.values() if key in t.settings]
                    raise InputError(f'norm {name!r}: {key} is for {", ".join(able)}')


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
        records = results(grid(args), args, console)
        if not records:
            raise InputError(f'nothing of this is done in {args.work_dir}')
        norms = list(dict.fromkeys(r['norm'] for r in records))
        norms.sort(key=lambda norm: NAMES.index(norm.split(',')[0]))
        rows = summarize(records)
        write_json(args.work_dir / 'results.json', records)
        write_csv(rows, args.work_dir / 'results.csv')
        write_runs(args.work_dir)
        with replacing(args.work_dir / 'results.md') as draft:
            Path(draft).write_text(markdown(rows, norms))
        draw(rows, norms, args.work_dir / 'error.png')
        pictures = [
            args.work_dir / 'error.png',
            *draw_curves(records, rows, norms, args.work_dir),
            *draw_predictions(records, rows, norms, args.work_dir),
        ]
    for table in tables(rows, norms):
        console.print(table)
    for picture in pictures:
        console.print(f'picture   {picture}')
    console.print(
        f'results   {args.work_dir / "results.json"}, results.csv, results.md, runs.csv'
    )
    failed = sum(row['failed'] for row in rows.values())
    if failed:
        sys.exit(f'error: {failed} runs failed; the same command tries again')


if __name__ == '__main__':
    main()
