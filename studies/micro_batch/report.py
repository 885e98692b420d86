"""The tables and the picture of a study."""

from pathlib import Path
from typing import Dict, List

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator
from rich.table import Table

from bcn_mm._files import replacing

from .norms import parse_norm
from .records import CLOSE, Key
from .tasks import TASKS, Run


def draw(rows: Dict[Key, dict], norms: List[str], path: Path) -> None:
    """A panel for each task: error against images per step.

    Where a task has one number of images per step, a bar for each norm.
    """
    tasks = [t for t in TASKS if any(key[0] == t for key in rows)]
    figure = Figure(figsize=(4.2 * len(tasks), 4.4), layout='constrained')
    axes = figure.subplots(1, len(tasks), squeeze=False)
    lines = {}
    for task, axis in zip(tasks, axes[0]):
        ticks = sorted({key[2] for key in rows if key[0] == task})
        for index, name in enumerate(norms):
            norm = parse_norm(name)
            points = [
                (n, rows[task, name, n]) for n in ticks if (task, name, n) in rows
            ]
            points = [(n, row) for n, row in points if row['seeds']]
            if not points:
                continue
            means = [row['mean'] for _, row in points]
            spreads = [0 if row['seeds'] < 2 else row['sd'] for _, row in points]
            if len(ticks) == 1:
                lines[norm.title] = axis.bar(
                    index,
                    means,
                    yerr=spreads,
                    capsize=2,
                    color=norm.colour,
                    hatch='//' if ',' in name else None,
                )
                continue
            # beside each other, so that spreads can be told apart
            shift = 2 ** (0.06 * (index - (len(norms) - 1) / 2))
            lines[norm.title] = axis.errorbar(
                [n * shift for n, _ in points],
                means,
                spreads,
                marker='o',
                markersize=4,
                linewidth=1.5,
                capsize=2,
                color=norm.colour,
                linestyle='--' if ',' in name else '-',
            )
        if len(ticks) == 1:
            axis.set_xticks([])
            axis.set_xlabel(f'{ticks[0]} per step')
            axis.grid(axis='y', alpha=0.3)
        else:
            axis.set_xscale('log', base=2)
            axis.set_xticks(ticks, ticks)
            axis.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
            axis.set_yscale('log')
            axis.minorticks_off()
            low, high = axis.get_ylim()
            subs = (1, 2, 3, 5, 7) if high > 4 * low else range(1, 10)
            axis.yaxis.set_major_locator(LogLocator(subs=subs))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.set_xlabel('images per step')
            axis.grid(alpha=0.3)
        axis.set_ylabel(TASKS[task].error)
        axis.set_title(TASKS[task].title)
    figure.legend(
        lines.values(),
        lines,
        loc='outside lower center',
        ncols=2 * min(len(tasks), 2),
        fontsize='small',
    )
    with replacing(path, '.part.png') as draft:
        figure.savefig(draft, dpi=120)


def _best(records: List[dict], rows: Dict[Key, dict], key: Key) -> List[dict]:
    """Of a norm, the runs at its best rate."""
    return [
        r
        for r in records
        if (r['task'], r['norm'], r['images']) == key and r['rate'] == rows[key]['rate']
    ]


def draw_curves(
    records: List[dict], rows: Dict[Key, dict], norms: List[str], folder: Path
) -> List[Path]:
    """The error on what is held out by steps, at each norm's best rate.

    A picture for each task at each number of images that was evaluated on its
    way; means over seeds.
    """
    drawn = []
    for task, images in sorted({(key[0], key[2]) for key in rows}):
        figure = Figure(figsize=(5.6, 4.2), layout='constrained')
        axis = figure.subplots()
        for name in norms:
            if (task, name, images) not in rows:
                continue
            curves = [
                r['curve']
                for r in _best(records, rows, (task, name, images))
                if len(r.get('curve', ())) > 1
            ]
            if not curves:
                continue
            norm = parse_norm(name)
            axis.plot(
                [step for step, _ in curves[0]],
                np.mean([[error for _, error in curve] for curve in curves], 0),
                marker='o',
                markersize=3,
                color=norm.colour,
                linestyle='--' if ',' in name else '-',
                label=f'{norm.title}, rate {rows[task, name, images]["rate"]:g}',
            )
        if not axis.lines:
            continue
        axis.set_xlabel('step')
        axis.set_ylabel(f'{TASKS[task].error}, held out')
        axis.set_title(f'{TASKS[task].title}, {images} per step')
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small')
        drawn.append(folder / f'curves-{task}-{images}.png')
        with replacing(drawn[-1], '.part.png') as draft:
            figure.savefig(draft, dpi=120)
    return drawn


def draw_predictions(
    records: List[dict], rows: Dict[Key, dict], norms: List[str], folder: Path
) -> List[Path]:
    """What networks at their norms' best rates make of validation pictures.

    A sheet for each task whose runs drew some: the truth, then a column for
    each norm, of the first seed.
    """
    drawn = []
    for task, images in sorted({(key[0], key[2]) for key in rows}):
        columns = {}
        for name in norms:
            for r in _best(records, rows, (task, name, images)):
                if r['seed'] == 0 and not r.get('diverged'):
                    run = Run(**{key: r[key] for key in Run._fields})
                    files = (folder / 'logs' / run.name).glob('*/vis_data/vis_image/*')
                    # a run that began again drew them again
                    newest = {f.name: f for f in sorted(files)}
                    if newest:
                        columns[parse_norm(name).title] = newest
        if not columns:
            continue
        shared = sorted(set.intersection(*map(set, columns.values())))
        shared = [file for file in shared if file.startswith('test_')][:4]
        if not shared:  # a few pictures, of which none was drawn
            continue
        figure = Figure(
            figsize=(2.6 * (1 + len(columns)), 2.1 * len(shared)), layout='constrained'
        )
        axes = figure.subplots(len(shared), 1 + len(columns), squeeze=False)
        for line, file in zip(axes, shared):
            for index, found in enumerate(columns.values()):
                # truth and prediction side by side
                truth, predicted = np.split(imread(found[file]), 2, axis=1)
                line[0].imshow(truth)
                line[1 + index].imshow(predicted)
        for axis, title in zip(axes[0], ['truth', *columns]):
            axis.set_title(title, fontsize='small')
        for axis in axes.flat:
            axis.axis('off')
        drawn.append(folder / f'predictions-{task}-{images}.jpg')
        with replacing(drawn[-1], '.part.jpg') as draft:
            figure.savefig(draft, dpi=100)
    return drawn


def tables(rows: Dict[Key, dict], norms: List[str]) -> List[Table]:
    """A table for each task: norms by images per step."""
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
    if len(row['tried']) > 1:
        close = [f'{rate:g}' for rate in row['close']]
        # where a rate beyond it might have been better still
        ends = {row['tried'][0]: ', the lowest', row['tried'][-1]: ', the highest'}
        end = ends.get(row['rate'], '')
        text += f', at {row["rate"]:g}{end} of {len(row["tried"])} rates'
        text += f', as good {" ".join(close)}'
    if row['near'] is not None:
        text += f', near {row["near"]:.1f}%'
    return text + (f', {row["failed"]} failed' if row['failed'] else '')


def markdown(rows: Dict[Key, dict], norms: List[str]) -> str:
    """A table for each task and number of images, as the results page has them.

    What is 100 less a metric is turned into the metric.
    """
    blocks = []
    for name, task in TASKS.items():
        for images in sorted({key[2] for key in rows if key[0] == name}):
            metric = task.error.replace('100 - ', '')
            turned = task.error.startswith('100 - ')
            lines = [
                f'{task.title}, {images} per step:',
                '',
                f'| norm | {metric} | seeds | rate | within {CLOSE:g} of it | tried | '
                f'diverged | dead or near (%) |',
                '| --- ' * 8 + '|',
            ]
            for norm in norms:
                row = rows.get((name, norm, images))
                if row and row['seeds']:
                    mean = 100 - row['mean'] if turned else row['mean']
                    spread = f' ± {row["sd"]:.1f}' if row['seeds'] > 1 else ''
                    near = '' if row['near'] is None else f'{row["near"]:.1f}'
                    lists = [
                        ', '.join(f'{rate:g}' for rate in row[key])
                        for key in ('close', 'tried', 'diverged')
                    ]
                    cells = [
                        parse_norm(norm).title,
                        f'{mean:.1f}{spread}',
                        row['seeds'],
                        f'{row["rate"]:g}',
                        *lists,
                        near,
                    ]
                    lines.append(f'| {" | ".join(map(str, cells))} |')
            blocks.append('\n'.join(lines))
    return '\n\n'.join(blocks) + '\n'
