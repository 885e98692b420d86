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
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
import yaml
from matplotlib.ticker import LogLocator
from measuring import plt, save_figure, write_json
from mmcv.cnn import ConvModule
from mmengine.config import Config
from pictures import dicts
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from bcn_mm import BCN
from bcn_mm.engine.cli import one_line_errors
from bcn_mm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


class Norm(NamedTuple):
    title: str
    norm_cfg: dict
    conv_cfg: dict
    colour: str
    follow_lr: bool = False


# 16 groups, as in the quickstart's configs: layers have 32 channels or more
_GN, _WS = dict(type='GN', num_groups=16), dict(type='WSConv2d')
NORMS = {
    'bn': Norm('BN', dict(type='BN'), None, 'tab:red'),
    'ln': Norm('LN', dict(type='GN', num_groups=1), None, 'tab:brown'),
    'in': Norm('IN', dict(type='IN', affine=True), None, 'tab:pink'),
    'gn': Norm('GN', _GN, None, 'tab:olive'),
    'gn-ws': Norm('GN + WS', _GN, _WS, 'tab:green'),
    'bcn': Norm('BCN', dict(type='BCN'), None, 'tab:cyan'),
    'bcn-ws': Norm('BCN + WS', dict(type='BCN'), _WS, 'tab:blue'),
}


class Task(NamedTuple):
    title: str
    error: str  # what is plotted
    epochs: int
    quick_epochs: int
    rate: float  # the learning rate at one image per step, and with what
    power: float  # power of their number it grows
    step_cost: float  # about how many seconds a step takes,
    image_cost: float  # and every image in it


TASKS = {
    'digits': Task(
        'digits, small CNN', 'test error (%)', 30, 3, 0.00625, 1, 5e-3, 5e-4
    ),
    'det': Task('shapes, Mask R-CNN', '100 - box mAP', 4, 1, 0.02, 0.5, 0.05, 0.12),
    'seg': Task('shapes, FCN', '100 - mIoU (%)', 4, 1, 0.05, 0.5, 0.03, 0.06),
}
# Of the 1,797 digits, that many are trained on.
DIGITS = 1000
CONFIGS = {
    'det': 'mask-rcnn_r18_bcn-ws_shapes.py',
    'seg': 'deeplabv3_r18-d8_bcn-ws_shapes.py',
}
# Reported by mmdet and mmseg: in the log, and times what it is a percentage.
METRICS = {'det': ('coco/bbox_mAP', 100), 'seg': ('mIoU', 1)}


class Run(NamedTuple):
    task: str
    norm: str
    images: int
    seed: int
    epochs: int
    pictures: int  # in an epoch
    rate: float  # of learning
    shift: int = 0  # in pixels, of digits

    @property
    def name(self) -> str:
        norm = self.norm.replace('=', '-').replace(',', '_')
        return f'{self.task}_{norm}_{self.images}_s{self.seed}'

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.pictures / self.images)

    @property
    def cost(self) -> float:
        task = TASKS[self.task]
        return self.steps * (task.step_cost + self.images * task.image_cost)


def parse_norm(text: str) -> Norm:
    """``bcn-ws,momentum=0.1`` -> the norm with that argument."""
    name, *options = text.split(',')
    if name not in NORMS:
        raise InputError(
            f'norm {name!r} is not one of {", ".join(NORMS)} (arguments of '
            f'the layer follow behind a comma: bcn-ws,momentum=0.1)'
        )
    norm = NORMS[name]
    pairs = [option.partition('=') for option in options]
    if not all(key and sign and value for key, sign, value in pairs):
        raise InputError(f'norm {text!r}: arguments look like momentum=0.1')
    more = {key: yaml.safe_load(value) for key, _, value in pairs}
    title = ', '.join([norm.title, *(f'{k} {v}' for k, v in more.items())])
    follow = bool(more.pop('follow_lr', False))
    norm_cfg = {**norm.norm_cfg, **more}
    return norm._replace(title=title, norm_cfg=norm_cfg, follow_lr=follow)


# --- the digits -----------------------------------------------------------


def digits() -> Tuple[torch.Tensor, torch.Tensor]:
    """1,797 pictures (N, 1, 8, 8) of values 0 to 1, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise InputError(
            "the digits come with scikit-learn: pip install -e '.[study]'"
        ) from e
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pictures = torch.from_numpy(data.images[order]).float().div_(16)
    return pictures.unsqueeze(1), torch.from_numpy(data.target[order])


def classifier(norm: Norm) -> nn.Sequential:
    def conv(cin, cout, stride=1):
        return ConvModule(
            cin,
            cout,
            3,
            stride,
            1,
            norm_cfg=norm.norm_cfg,
            conv_cfg=norm.conv_cfg,
        )

    return nn.Sequential(
        # one channel of nine values, which WS would leave eight
        ConvModule(1, 32, 3, 1, 1, norm_cfg=norm.norm_cfg),
        conv(32, 64, 2),
        conv(64, 64),
        conv(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def batches(
    run: Run, pictures: torch.Tensor, classes: torch.Tensor
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """What is trained on, step by step: every picture once in an epoch, moved
    at random by up to ``run.shift`` pixels down or up and to either side."""
    size = pictures.shape[-1]
    padded = nn.functional.pad(pictures, [run.shift] * 4)
    places = padded.unfold(2, size, 1).unfold(3, size, 1)
    for _ in range(run.epochs):
        for chosen in torch.randperm(len(pictures)).split(run.images):
            down, right = torch.randint(places.shape[2], (2, len(chosen)))
            yield places[chosen, :, down, right], classes[chosen]


def train_digits(run: Run) -> float:
    """Returns the error on the 797 pictures not trained on, in percent."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    pictures, classes = digits()
    norm = parse_norm(run.norm)
    model = classifier(norm).train()
    following = {
        layer: layer.momentum
        for layer in model.modules()
        if norm.follow_lr and isinstance(layer, BCN)
    }
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=run.rate,
        momentum=0.9,
        weight_decay=1e-4,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    for shown, true in batches(run, pictures[:DIGITS], classes[:DIGITS]):
        for layer, momentum in following.items():
            layer.momentum = momentum * schedule.get_last_lr()[0] / run.rate
        loss = nn.functional.cross_entropy(model(shown), true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = model(pictures[DIGITS:]).argmax(1)
    wrong = found != classes[DIGITS:]
    return 100 * wrong.double().mean().item()


# --- the shapes -----------------------------------------------------------


def shapes_config(run: Run) -> Config:
    """The quickstart's config with another norm and batch size."""
    norm = parse_norm(run.norm)
    cfg = Config.fromfile(ROOT / 'configs/quickstart' / CONFIGS[run.task])
    if run.task == 'seg':
        auxiliary = cfg.model.auxiliary_head
        cfg.model.decode_head = dict(
            auxiliary,
            in_channels=cfg.model.decode_head.in_channels,
            in_index=3,
            num_convs=2,
            loss_decode=cfg.model.decode_head.loss_decode,
        )
    for node in dicts(cfg.model):
        if node.get('type') == 'BCN':
            node.clear()
            node.update(norm.norm_cfg)
        elif 'conv_cfg' in node:
            node.conv_cfg = norm.conv_cfg
    cfg.train_dataloader.update(
        batch_size=run.images, num_workers=0, persistent_workers=False
    )
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=run.steps, val_interval=run.steps
    )
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.pop('batch_sampler', None)
    cfg.optim_wrapper.optimizer.lr = run.rate
    if run.task == 'det':  # its epochs, in steps
        warmup, drop = cfg.param_scheduler
        warmup.end = max(1, run.steps // 16)
        drop.update(by_epoch=False, milestones=[3 * run.steps // 4])
    else:
        cfg.param_scheduler[0].end = run.steps
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=-1, save_last=False
    )
    cfg.default_hooks.logger.log_metric_by_epoch = False
    cfg.log_processor = dict(type='LogProcessor', by_epoch=False)
    cfg.custom_hooks.append(dict(type='EliminationSingularityHook'))
    cfg.randomness = dict(seed=run.seed)
    return cfg


_children: List[subprocess.Popen] = []


def train_shapes(run: Run, folder: Path) -> dict:
    """Returns ``error``, 100 less the metric in percent, and what part of the
    channels was ``dead`` or ``near`` elimination at last, in percent too."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes_config(run).dump(folder / 'config.py')
    begun = time.time()
    with (folder / 'train.log').open('w') as log:
        process = subprocess.Popen(
            [
                sys.executable,
                'tools/train.py',
                folder / 'config.py',
                '--work-dir',
                folder,
            ],
            cwd=ROOT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _children.append(process)
        if process.wait():
            raise RuntimeError(f'training failed, see {log.name}')
        _children.remove(process)
    scalars = {}
    for file in folder.glob('*/vis_data/scalars.json'):
        if file.stat().st_mtime >= begun:
            for line in file.read_text().splitlines():
                scalars.update(json.loads(line))
    name, factor = METRICS[run.task]
    # mmdet writes no metric for a model that finds nothing at all
    result = dict(error=100 - factor * scalars.get(name, 0.0))
    for key in ('dead', 'near'):  # of the norms that the hook knows
        if f'singularity/{key}' in scalars:
            result[key] = 100 * scalars[f'singularity/{key}']
    return result


# --- all of them ----------------------------------------------------------


def perform(run: Run, folder: Path) -> dict:
    if run.task == 'digits':
        return dict(error=train_digits(run))
    return train_shapes(run, folder / 'logs' / run.name)


def work(run: Run, folder: Path) -> dict:
    """Train; a run that fails is recorded too, and tried again next time."""
    begun, record = time.monotonic(), run._asdict()
    try:
        record.update(perform(run, folder))
        if not math.isfinite(record['error']):
            raise ArithmeticError('the error is not finite')
    except Exception as e:
        record['error'] = None
        record['failed'] = ' '.join(str(e).split()) or type(e).__name__
    record['minutes'] = (time.monotonic() - begun) / 60
    write_json(folder / 'runs' / f'{run.name}.json', record)
    return record


def grid(args: argparse.Namespace) -> List[Run]:
    """What was asked for, the longest first."""
    runs = []
    for name in args.tasks:
        task = TASKS[name]
        norms, images, seeds = args.norms, args.images, args.seeds
        if args.quick:
            few = name != 'digits'
            main = ('bn', 'gn-ws', 'bcn-ws')
            norms = norms or (main if few else NORMS)
            images = images or ((1,) if few else (1, 2, 4, 8, 16))
            seeds = seeds or (1 if few else 2)
        pictures = DIGITS if name == 'digits' else count_shapes(args.data)
        epochs = args.epochs or (task.quick_epochs if args.quick else task.epochs)
        runs += [
            Run(
                name,
                norm,
                n,
                seed,
                epochs,
                pictures,
                task.rate * n**task.power,
                args.shift if name == 'digits' else 0,
            )
            for norm in norms or NORMS
            for n in images or (1, 2, 4, 8, 16)
            for seed in range(seeds or 3)
        ]
    return sorted(runs, key=lambda run: (-run.cost, run.seed))


def known(run: Run, folder: Path) -> dict:
    """The record of a run that is done, as it is asked for now."""
    try:
        record = json.loads((folder / 'runs' / f'{run.name}.json').read_text())
    except (OSError, ValueError):
        return {}
    same = all(record.get(k) == v for k, v in run._asdict().items())
    return record if same and record.get('error') is not None else {}


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent deals with it
    signal.signal(signal.SIGTERM, _end_worker)
    torch.set_num_threads(1)


def _end_worker(*_) -> None:
    for process in _children:
        process.kill()
    os._exit(1)


def study(runs: List[Run], args, console: Console) -> List[dict]:
    """Perform what is not done yet, side by side; returns all records."""
    records = [known(run, args.work_dir) for run in runs]
    open_runs = [run for run, record in zip(runs, records) if not record]
    records = [record for record in records if record]
    if records:
        console.print(f'{len(records)} of {len(runs)} runs are done already')
    # of mmengine, about its use of pkg_resources, from every worker
    os.environ.setdefault('PYTHONWARNINGS', 'ignore::UserWarning')
    pool = ProcessPoolExecutor(
        args.workers,
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
        shown = bar.add_task('training', total=sum(r.cost for r in open_runs))
        futures = {pool.submit(work, run, args.work_dir): run for run in open_runs}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                run, record = futures[future], future.result()
                records.append(record)
                bar.update(
                    shown,
                    advance=run.cost,
                    description=f'{count}/{len(open_runs)} runs',
                )
                what = (
                    f'{TASKS[run.task].error} {record["error"]:.2f}'
                    if record['error'] is not None
                    else f'[red]failed: {record["failed"]}'
                )
                console.print(
                    f'{run.task} {run.norm}, images {run.images}, seed '
                    f'{run.seed}: {what} in {record["minutes"]:.1f} min'
                )
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return records


Key = Tuple[str, str, int]


def summarize(records: List[dict]) -> Dict[Key, dict]:
    """Mean and spread over seeds, by (task, norm, images)."""
    groups: Dict[Key, List[dict]] = {}
    for r in sorted(records, key=lambda r: (r['images'], r['seed'])):
        groups.setdefault((r['task'], r['norm'], r['images']), []).append(r)
    rows = {}
    for key, members in groups.items():
        values = [r['error'] for r in members if r['error'] is not None]
        spread = np.std(values, ddof=1) if len(values) > 1 else float('nan')
        rows[key] = dict(
            mean=float(np.mean(values)) if values else float('nan'),
            sd=float(spread),
            se=float(spread / max(len(values), 1) ** 0.5),
            seeds=len(values),
            failed=len(members) - len(values),
            **{
                key: float(np.mean(known)) if known else None
                for key in ('dead', 'near')
                for known in [[r[key] for r in members if key in r]]
            },
        )
    return rows


def write_csv(rows: Dict[Key, dict], path: Path) -> None:
    draft = path.with_name(path.name + '.part')
    with draft.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                'task',
                'norm',
                'images_per_step',
                'error_mean',
                'error_sd',
                'error_se',
                'seeds',
                'failed',
                'dead_percent',
                'near_percent',
            ]
        )
        for key, row in rows.items():
            writer.writerow([*key, *row.values()])
    draft.replace(path)


def draw(rows: Dict[Key, dict], norms: List[str], path: Path) -> None:
    """A panel for each task: error against images per step."""
    tasks = [t for t in TASKS if any(key[0] == t for key in rows)]
    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(4.2 * len(tasks), 4.4),
        squeeze=False,
        layout='constrained',
    )
    lines = {}
    for task, axis in zip(tasks, axes[0]):
        ticks = sorted({key[2] for key in rows if key[0] == task})
        for index, name in enumerate(norms):
            norm = parse_norm(name)
            points = [
                (n, rows[task, name, n]) for n in ticks if (task, name, n) in rows
            ]
            if not points:
                continue
            # beside each other, so that spreads can be told apart
            shift = 2 ** (0.06 * (index - (len(norms) - 1) / 2))
            lines[norm.title] = axis.errorbar(
                [n * shift for n, _ in points],
                [row['mean'] for _, row in points],
                [0 if row['seeds'] < 2 else row['sd'] for _, row in points],
                marker='o',
                markersize=4,
                linewidth=1.5,
                capsize=2,
                color=norm.colour,
                linestyle='--' if ',' in name else '-',
            )
        axis.set_xscale('log', base=2)
        axis.set_xticks(ticks, ticks)
        axis.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
        axis.set_yscale('log')
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter('{x:g}')
        axis.set_xlabel('images per step')
        axis.set_ylabel(TASKS[task].error)
        axis.set_title(TASKS[task].title)
        axis.grid(alpha=0.3)
    figure.legend(
        lines.values(),
        lines,
        loc='outside lower center',
        ncols=4,
        fontsize='small',
    )
    save_figure(figure, path)


def tables(rows: Dict[Key, dict], norms: List[str]) -> List[Table]:
    found = []
    for name, task in TASKS.items():
        images = sorted({key[2] for key in rows if key[0] == name})
        if not images:
            continue
        table = Table(
            title=f'{task.title}: {task.error}, mean +- standard deviation '
            f'over seeds (their number)'
        )
        table.add_column('images per step')
        for n in images:
            table.add_column(str(n), justify='right')
        for norm in norms:
            cells = [rows.get((name, norm, n)) for n in images]
            if any(cells):
                table.add_row(parse_norm(norm).title, *map(_cell, cells))
        found.append(table)
    return found


def _cell(row: dict) -> str:
    if not row:
        return ''
    text = f'{row["mean"]:.2f}'
    if row['seeds'] > 1:
        text += f' +- {row["sd"]:.2f}'
    text += f' ({row["seeds"]})'
    if row['near'] is not None:
        text += f', near {row["near"]:.1f}%'
    return text + (f', {row["failed"]} failed' if row['failed'] else '')


def prepare_shapes(folder: Path) -> None:
    """Draw the pictures, unless they are there."""
    os.environ['SHAPES_ROOT'] = os.fspath(folder)
    if not (folder / 'annotations').is_dir():
        tool = 'tools/dataset_converters/make_shapes.py'
        if subprocess.run([sys.executable, tool, folder], cwd=ROOT).returncode:
            raise InputError(f'the pictures could not be drawn in {folder}')


def count_shapes(folder: Path) -> int:
    path = folder / 'annotations' / 'instances_train.json'
    return len(json.loads(path.read_text())['images'])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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


def main() -> None:
    args = parse_args()
    console = Console()
    # ends the workers too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: stopped'))
    with one_line_errors():
        counts = [args.workers, *(args.images or ())]
        counts += [n for n in (args.seeds, args.epochs) if n is not None]
        if min(counts) < 1:
            raise InputError(
                '--images, --seeds, --epochs and --workers must be positive'
            )
        if args.shift < 0:
            raise InputError('--shift must not be negative')
        for norm in args.norms or ():
            if parse_norm(norm).follow_lr and args.tasks != ['digits']:
                raise InputError(f'norm {norm!r}: follow_lr is for the digits')
        if 'digits' in args.tasks:
            digits()
        if set(args.tasks) & set(CONFIGS):
            prepare_shapes(args.data)
        runs = grid(args)
        records = study(runs, args, console)
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
