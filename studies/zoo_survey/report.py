"""The tables of a survey."""

import collections
from typing import Dict, Iterable, List, Optional

from rich.console import Console
from rich.table import Table

from .zoo import folder_of


def report(content: dict, console: Console) -> int:
    """Print the tables; returns the number of failures."""
    results, steps = content['configs'], content['steps']
    tables = [
        _summary(results),
        _by_reason(
            ((n, r['stock_error']) for n, r in results.items() if 'stock_error' in r),
            'The stock model does not build',
        ),
        _by_reason(
            (
                (n, f'{kind} {where}')
                for n, r in results.items()
                for where, kind in _last_words(r.get('left') or {}).items()
            ),
            'Norms left: built by a component without asking its config',
        ),
        _by_reason(
            ((n, r['error']) for n, r in results.items() if 'error' in r),
            'FAILED: the stock model builds, the converted one does not',
        ),
    ]
    if steps:
        good = [s for s in steps.values() if 'converted' in s]
        console.print(f'Two steps: {len(good)} of {len(steps)} folders')
        tables += [
            _recomputed(steps),
            _by_reason(
                ((f, s['stock_error']) for f, s in steps.items() if 'stock' not in s),
                'Two steps: the stock model does not train',
            ),
            _by_reason(
                ((f, s['error']) for f, s in steps.items() if 'error' in s),
                'FAILED: the stock model trains, the converted one does not',
            ),
        ]
    for table in filter(None, tables):
        console.print(table)
    return sum('error' in r for r in (*results.values(), *steps.values()))


def _summary(results: dict) -> Table:
    table = Table(title='Norms by method')
    for heading in (
        'method',
        'configs',
        'stock model builds',
        'with norms',
        'converted',
        'norms',
        'to BCN',
        'left',
    ):
        table.add_column(heading, justify='left' if heading == 'method' else 'right')
    groups = collections.defaultdict(list)
    for name, result in results.items():
        if 'skipped' not in result:
            groups[folder_of(name)].append(result)
    rows = [(name, *_totals(group)) for name, group in sorted(groups.items())]
    for row in rows:
        table.add_row(*map(str, row))
    table.add_section()
    table.add_row('all', *map(str, map(sum, list(zip(*rows))[1:])))
    return table


def _totals(group: List[dict]) -> tuple:
    """Of one method: the numbers in its row."""
    built = [r for r in group if 'stock' in r]
    norms = [r for r in built if r['stock']]
    good = [r for r in norms if 'error' not in r]
    return (
        len(group),
        len(built),
        len(norms),
        len(good),
        sum(sum(r['stock'].values()) for r in good),
        sum(r['converted'].get('BCN', 0) for r in good),
        sum(len(r['left']) for r in good),
    )


def _recomputed(steps: Dict[str, dict]) -> Table:
    table = Table(
        title='Two steps with activations recomputed: the same bits; saved for '
        'the backward pass, MiB'
    )
    for heading in ('method', 'without', 'with', 'ratio'):
        table.add_column(heading, justify='left' if heading == 'method' else 'right')
    for folder, step in sorted(steps.items()):
        if 'recomputed' in step and 'error' not in step:
            spared, kept = (step['recomputed'][k] / 2**20 for k in ('spared', 'kept'))
            table.add_row(
                folder,
                f'{spared + kept:.1f}',
                f'{kept:.1f}',
                f'{kept / (spared + kept):.2f}',
            )
    return table


def _by_reason(items: Iterable, heading: str) -> Optional[Table]:
    """Names grouped by why; None if there are none."""
    groups = collections.defaultdict(list)
    for name, reason in items:
        groups[reason[:160]].append(name)
    if not groups:
        return None
    table = Table(title=heading, show_lines=True)
    table.add_column('reason', ratio=3)
    table.add_column('configs', justify='right')
    table.add_column('where', ratio=2)
    for reason, names in sorted(groups.items(), key=lambda i: -len(i[1])):
        where = sorted({n.rsplit('/', 1)[0] for n in names})
        table.add_row(reason, str(len(names)), ', '.join(where))
    return table


def _last_words(left: Dict[str, str]) -> Dict[str, str]:
    """Layers by their place in the model, numbers left out."""
    return {
        '.'.join(w for w in where.split('.') if not w.isdigit()): kind
        for where, kind in left.items()
    }
