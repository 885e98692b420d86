"""Make a small data set, train on it at one image per step, show the result.

Every step is a command that you could type; each is printed before it runs.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Table

from bcn_mm._files import replacing
from bcn_mm.engine.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
NORMS = {'bcn-ws': 'BCN + WS', 'gn-ws': 'GN + WS', 'bn': 'BN'}
# What mmengine logs of a step.
STEP = r'(?:Epoch|Iter)\((?:train|test)\) +((?:\[ *\d+\])?\[ *\d+/ *\d+\])'
# How many pictures the sheet shows.
ROWS = 4


class Task(NamedTuple):
    title: str
    config: str
    metrics: dict  # name in the log: heading
    quick: tuple  # what --quick overrides


TASKS = {
    'det': Task(
        'Mask R-CNN',
        'mask-rcnn_r18_{}_shapes.py',
        {'coco/bbox_mAP': 'box mAP', 'coco/segm_mAP': 'mask mAP'},
        ('train_cfg.max_epochs=1', 'train_cfg.val_interval=1'),
    ),
    'seg': Task(
        'DeepLabV3',
        'deeplabv3_r18-d8_{}_shapes.py',
        {'mIoU': 'mIoU (%)', 'aAcc': 'accuracy (%)'},
        (
            'train_cfg.max_iters=20',
            'train_cfg.val_interval=20',
            'default_hooks.checkpoint.interval=20',
        ),
    ),
}

console = Console()


def call(words: list, log: Path, what: str, environment: dict, passes: int = 1) -> None:
    """Run one of the tools with a progress bar fed by what it logs."""
    given = [f'{name}={shlex.quote(value)}' for name, value in environment.items()]
    typed = ' '.join([*given, shlex.join(['python', *map(str, words)])])
    console.print(f'[dim]$ {escape(typed)}')
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    last, tenths = '', 0
    bar = progress_bar(TextColumn('{task.fields[loss]}'), console=console)
    with bar, log.open('w', buffering=1) as file, process:
        task = bar.add_task(what, total=None, loss='')
        for line in process.stdout:
            file.write(line)
            last = line.strip() or last
            found = re.search(STEP, line)
            if not found:
                continue
            # [step/steps], behind [epoch] in a loop by epochs
            *epoch, step, steps = map(int, re.findall(r'\d+', found.group(1)))
            done = step + (epoch[0] - 1) * steps if epoch else step
            total = steps * (passes if epoch else 1)
            loss = re.search(r' loss: \S+', line)
            loss = loss.group() if loss else ''
            bar.update(task, completed=done, total=total, loss=loss)
            if not console.is_terminal and 10 * done // total > tenths:
                tenths = 10 * done // total
                console.print(f'{what}: {done}/{total}{loss}')
    if process.returncode:
        sys.exit(f'error: {what} failed: {last} (the log is {log})')


def newest(folder: Path, pattern: str) -> Path:
    """The file that was written last; a work directory outlives runs."""
    return max(folder.glob(pattern), key=lambda f: f.stat().st_mtime)


def train_and_test(task: Task, norm: str, args) -> dict:
    """Train with one norm, test the checkpoint; returns a row of the table."""
    config = Path('configs/quickstart', task.config.format(norm))
    folder = args.work_dir / f'{args.task}-{norm}'
    environment = {'SHAPES_ROOT': os.fspath(args.data)}
    options = [*(task.quick if args.quick else ()), *args.cfg_options]
    start = time.monotonic()
    call(
        [
            'tools/train.py',
            config,
            '--work-dir',
            folder / 'train',
            '--cfg-options',
            'default_hooks.logger.interval=20',
            *options,
        ],
        folder / 'train.log',
        f'training with {NORMS[norm]}',
        environment,
        1 if args.quick else 4,
    )
    minutes = (time.monotonic() - start) / 60
    checkpoint = newest(folder / 'train', '*.pth')
    begun = time.time()
    call(
        [
            'tools/test.py',
            config,
            checkpoint,
            '--work-dir',
            folder / 'test',
            '--show-dir',
            folder / 'pictures',
            '--cfg-options',
            'default_hooks.logger.interval=5',
            *args.cfg_options,
        ],
        folder / 'test.log',
        f'testing with {NORMS[norm]}',
        environment,
    )
    # mmdet writes none for a model that finds nothing at all
    logs = list((folder / 'test').glob('*/*.json'))
    logs = [f for f in logs if f.stat().st_mtime >= begun]
    metrics = json.loads(logs[0].read_text()) if logs else {}
    return {
        'norm': NORMS[norm],
        'minutes': minutes,
        'checkpoint': checkpoint,
        'pictures': folder / 'pictures',
        **{name: metrics.get(name, 0.0) for name in task.metrics},
    }


def draw_sheet(rows: list, path: Path) -> None:
    """One picture a row: the truth, then what each model predicts.

    The visualization hooks draw truth and prediction side by side.
    """
    columns = [sorted(r['pictures'].rglob('*.[jp][pn]g'))[:ROWS] for r in rows]
    count = min(map(len, columns))
    figure, axes = plt.subplots(
        count,
        1 + len(rows),
        figsize=(2.4 * (1 + len(rows)), 2.4 * count + 0.3),
        squeeze=False,
    )
    for line, files in zip(axes, zip(*columns)):
        for index, file in enumerate(files):
            both = plt.imread(file)
            truth, prediction = np.split(both, 2, axis=1)
            if index == 0:
                line[0].imshow(truth)
            line[1 + index].imshow(prediction)
    for axis, title in zip(axes[0], ['truth', *(r['norm'] for r in rows)]):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis('off')
    figure.tight_layout(pad=0.4)
    with replacing(path, '.part.png') as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)


def show_table(task: Task, rows: list, sheet: Path, args) -> None:
    table = Table(title=f'{task.title}, one image per step, from scratch')
    for heading in ('norm', *task.metrics.values(), 'minutes', 'checkpoint'):
        table.add_column(heading, overflow='fold')
    for row in rows:
        table.add_row(
            row['norm'],
            *(f'{row[name]:.3f}' for name in task.metrics),
            f'{row["minutes"]:.1f}',
            os.path.relpath(row['checkpoint']),
        )
    console.print(table)
    console.print(f'data      {args.data}')
    console.print(f'pictures  {sheet}')
    console.print(f'logs      {args.work_dir}')
    if args.quick:
        console.print('[yellow]--quick: these metrics mean nothing')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--task',
        choices=TASKS,
        default='det',
        help='det: Mask R-CNN; seg: DeepLabV3 (%(default)s)',
    )
    parser.add_argument(
        '--compare',
        action='store_true',
        help='train GN + WS and BN too',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='a few pictures and steps, to see that everything runs',
    )
    parser.add_argument(
        '--data',
        type=Path,
        help='where the pictures are or go (data/shapes)',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs' / 'quickstart',
        help='where logs, checkpoints and pictures go (%(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='of the training (%(default)s)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of training and test, as in tools/train.py',
    )
    args = parser.parse_args()
    folder = 'shapes-quick' if args.quick else 'shapes'
    args.data = (args.data or ROOT / 'data' / folder).resolve()
    args.work_dir = args.work_dir.resolve()
    args.cfg_options.append(f'randomness.seed={args.seed}')
    return args


def main() -> None:
    args = parse_args()
    task = TASKS[args.task]
    size = {'--train': 12, '--val': 6} if args.quick else {}
    call(
        [
            'tools/dataset_converters/make_shapes.py',
            args.data,
            *(word for pair in size.items() for word in pair),
        ],
        args.work_dir / 'data.log',
        'drawing pictures',
        {},
    )
    norms = NORMS if args.compare else ['bcn-ws']
    rows = [train_and_test(task, norm, args) for norm in norms]
    sheet = args.work_dir / f'{args.task}-predictions.png'
    draw_sheet(rows, sheet)
    show_table(task, rows, sheet, args)


if __name__ == '__main__':
    main()
