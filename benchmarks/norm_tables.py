"""What norms.py shows: its tables and its plot, of the numbers in its JSON."""

from pathlib import Path
from typing import Callable, Dict, List, Sequence

from measuring import draw_bars, geometric_mean
from norm_layers import BASE
from rich.console import Console
from rich.table import Table

PHASES = ('forward', 'backward', 'both')


def ratio(case: dict, name: str, phase: str = 'both') -> float:
    return case[name][phase] / case[BASE][phase]


def summarize(cases: Sequence[dict], names: Sequence[str]) -> dict:
    """Of every layer and phase, the ratios to the first layer over all inputs."""
    summary = {}
    for name in names:
        measured = [case for case in cases if name in case]
        if measured:
            summary[name] = {}
        for phase in PHASES if measured else ():
            ratios = [ratio(case, name, phase) for case in measured]
            summary[name][phase] = dict(
                geometric_mean=geometric_mean(ratios), worst=max(ratios)
            )
    return summary


def show(results: dict, groups: Dict[str, List[str]], names: Sequence[str]) -> None:
    """Print all tables.

    Args:
        results (dict): What the JSON file holds.
        groups (dict): The inputs of every setting, by their titles.
        names (list[str]): The layers, as columns.
    """
    console = Console()
    if not console.is_terminal:
        # a file has room for a line a row
        console = Console(width=200)
    console.print(_times(results, groups, names))
    cases = results['layers']
    table = _table('memory in multiples of the input: kept, at the peak', names)
    for title, case in cases.items():
        _add(
            table,
            title,
            case,
            names,
            lambda row: f'{row["kept"]:.2f}, {row["peak"]:.2f}',
        )
    console.print(table)
    table = _table('forward + backward: share of the bandwidth of a copy', names)
    table.caption = (
        f'a copy reads and writes {results["copy_bandwidth"] / 1e9:.1f} GB/s; '
        'counted are 5 times the input, the least there is: x and y forward, dy, x '
        'and dx backward (8 times if no cache holds the map, whose statistics then '
        'read it once more)'
    )
    for title, case in cases.items():
        _add(table, title, case, names, lambda row: f'{row["of_copy"]["both"]:.2f}')
    console.print(table)
    console.print(_weights(results['weights']))
    made = {row['backend'] for c in cases.values() for row in [c.get('BCN')] if row}
    if made:
        console.print(f'BCN: its passes are made by {", ".join(sorted(made))}')
    machine = results['machine']
    console.print(', '.join(f'{key} {value}' for key, value in machine.items()))


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column('input', no_wrap=True)
    for name in names:
        table.add_column(name, justify='right')
    return table


def _add(
    table: Table,
    title: str,
    case: dict,
    names: Sequence[str],
    cell: Callable[[dict], str],
    style: str = '',
) -> None:
    cells = (cell(case[n]) if n in case else '-' for n in names)
    table.add_row(title, *cells, style=style)


def _times(results: dict, groups: dict, names: Sequence[str]) -> Table:
    heading = f'forward + backward: ms, and the ratio to {BASE}'
    if results['machine']['busy']:
        heading += ', beside a process that competes for the CPU'
    table = _table(heading, names)
    for setting, titles in groups.items():
        for title in titles:
            case = results['layers'][title]
            base = case[BASE]['both']
            _add(
                table,
                title,
                case,
                names,
                lambda row, b=base: f'{row["both"] * 1e3:.2f} ({row["both"] / b:.2f})',
            )
        table.add_section()
        for label, phase, measure in (
            ('geometric mean', 'both', 'geometric_mean'),
            ('worst', 'both', 'worst'),
            ('  forward', 'forward', 'geometric_mean'),
            ('  backward', 'backward', 'geometric_mean'),
        ):
            _add(
                table,
                label,
                results['summary'][setting],
                names,
                lambda row, p=phase, m=measure: f'{row[p][m]:.2f}',
                style='bold' if phase == 'both' else '',
            )
        table.add_section()
    for setting, case in results['dispatch'].items():
        base = case[BASE]['both']
        _add(
            table,
            f'dispatch {setting}' if len(groups) > 1 else 'dispatch, a tiny input',
            case,
            names,
            lambda row, b=base: f'{row["both"] * 1e6:.1f} us ({row["both"] / b:.2f})',
        )
    return table


def _weights(weights: dict) -> Table:
    table = Table(title="standardizing all of ResNet-50's convolutions")
    for heading in ('', *PHASES, "to mmcv's"):
        table.add_column(heading, justify='right')
    base = weights["mmcv's ConvWS"]['both']
    for name, times in weights.items():
        table.add_row(
            name,
            *(f'{times[p] * 1e3:.1f} ms' for p in PHASES),
            f'{times["both"] / base:.2f}',
        )
    return table


def plot(path: Path, cases: Dict[str, dict], names: Sequence[str]) -> None:
    """Draw the ratios of every layer to the first."""
    nothing = float('nan')
    draw_bars(
        path,
        list(cases),
        {
            name: [ratio(c, name) if name in c else nothing for c in cases.values()]
            for name in names
            if name != BASE
        },
        f'forward + backward, times that of {BASE}',
    )
