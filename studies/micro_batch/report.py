"""The tables and the picture of a study."""

from pathlib import Path
from typing import Dict, List

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.table import Table

from bcn_mm._files import replacing

from .norms import parse_norm
from .records import Key
from .tasks import TASKS


def draw(rows: Dict[Key, dict], norms: List[str], path: Path) -> None:
    """A panel for each task: error against images per step."""
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
    with replacing(path, '.part.png') as draft:
        figure.savefig(draft, dpi=120)


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
    if row['near'] is not None:
        text += f', near {row["near"]:.1f}%'
    return text + (f', {row["failed"]} failed' if row['failed'] else '')
