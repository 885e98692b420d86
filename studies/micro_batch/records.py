"""What runs gave: a file for each, and what they say together."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np

from bcn_mm._files import replacing, write_json
from studies import ROOT

from .tasks import Run

#: Of a row: task, norm, images per step.
Key = Tuple[str, str, int]
#: Rates whose error is higher than the best one's by no more are as good.
CLOSE = 3.0


def keep(run: Run, record: dict, folder: Path) -> None:
    """Keep what a run gave, for :func:`known`."""
    write_json(_path(run, folder), record)


def commit() -> str:
    """Of this repository, ``-dirty`` where it was changed since; empty without git."""
    words = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ''
    return done.stdout.strip()


def known(run: Run, folder: Path) -> dict:
    """The record of a run that is done, as it is asked for now; else empty."""
    record = _read(_path(run, folder))
    same = all(record.get(k) == v for k, v in run._asdict().items())
    return record if same and record.get('error') is not None else {}


def _read(path: Path) -> dict:
    """A record; empty where there is none, or one that was not written to its end."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _path(run: Run, folder: Path) -> Path:
    return folder / 'runs' / f'{run.name}.json'


def by_key(records: List[dict]) -> Dict[Key, List[dict]]:
    """Those of each (task, norm, images)."""
    groups: Dict[Key, List[dict]] = {}
    for r in sorted(records, key=lambda r: (r['images'], r['rate'], r['seed'])):
        groups.setdefault((r['task'], r['norm'], r['images']), []).append(r)
    return groups


def chosen_by(record: dict) -> float:
    """What rates are chosen by: the error on what was held out.

    Where nothing was, the error itself: there is one rate, or the task is to
    fit the pictures that it is trained on.
    """
    return record['held'] if record['held_out'] else record['error']


def rates_of(members: List[dict]) -> Tuple[float, List[float]]:
    """The best rate of a norm, and those that are about as good.

    The best has the lowest mean of :func:`chosen_by` over seeds, among the
    rates that most seeds were tried at. Others are compared with it over the
    seeds that both have.

    Args:
        members (list[dict]): Records of one (task, norm, images), with one
            that has not failed at least.
    """
    errors: Dict[float, Dict[int, float]] = {}
    for r in members:
        if r['error'] is not None:
            errors.setdefault(r['rate'], {})[r['seed']] = chosen_by(r)
    most = max(map(len, errors.values()))
    best = min(
        (rate for rate in errors if len(errors[rate]) == most),
        key=lambda rate: (np.mean(list(errors[rate].values())), rate),
    )

    def behind(rate: float) -> float:
        shared = errors[rate].keys() & errors[best].keys()
        gaps = [errors[rate][seed] - errors[best][seed] for seed in shared]
        return float(np.mean(gaps)) if gaps else float('inf')

    return best, sorted(rate for rate in errors if behind(rate) <= CLOSE)


def summarize(records: List[dict]) -> Dict[Key, dict]:
    """Mean and spread over seeds at the best rate, by (task, norm, images)."""
    rows = {}
    for key, members in by_key(records).items():
        done = [r for r in members if r['error'] is not None]
        best, close = rates_of(members) if done else (members[0]['rate'], [])
        at_best = [r for r in done if r['rate'] == best]
        values = [r['error'] for r in at_best]
        spread = np.std(values, ddof=1) if len(values) > 1 else float('nan')
        rows[key] = dict(
            mean=float(np.mean(values)) if values else float('nan'),
            sd=float(spread),
            se=float(spread / max(len(values), 1) ** 0.5),
            seeds=len(values),
            failed=len(members) - len(done),
            dead=_mean_of('dead', at_best),
            near=_mean_of('near', at_best),
            rate=best,
            close=close,
            tried=sorted({r['rate'] for r in done}),
            diverged=sorted({r['rate'] for r in done if r.get('diverged')}),
            loss=_mean_of('loss', at_best),
        )
    return rows


def _mean_of(key: str, members: List[dict]):
    values = [r[key] for r in members if key in r]
    return float(np.mean(values)) if values else None


#: Column of results.csv -> of a row.
_COLUMNS = dict(
    error_mean='mean',
    error_sd='sd',
    error_se='se',
    seeds='seeds',
    failed='failed',
    dead_percent='dead',
    near_percent='near',
    rate='rate',
    close_rates='close',
    rates='tried',
    diverged_at='diverged',
    loss='loss',
)


def write_csv(rows: Dict[Key, dict], path: Path) -> None:
    """Write what :func:`summarize` returns."""
    with replacing(path) as draft, open(draft, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['task', 'norm', 'images_per_step', *_COLUMNS])
        for key, row in rows.items():
            cells = [row[name] for name in _COLUMNS.values()]
            writer.writerow(
                [
                    *key,
                    *(
                        ' '.join(f'{c:g}' for c in cell)
                        if isinstance(cell, list)
                        else cell
                        for cell in cells
                    ),
                ]
            )


#: Columns of runs.csv, of a record.
_OF_A_RUN = (
    *Run._fields,
    *('error', 'held', 'dead', 'near', 'loss', 'diverged', 'minutes', 'commit'),
)


def write_runs(folder: Path) -> None:
    """Write ``runs.csv``, a line for every run that is kept in this folder."""
    kept = list(filter(None, map(_read, (folder / 'runs').glob('*.json'))))
    order = ('task', 'images', 'norm', 'epochs', 'pictures', 'rate', 'seed')
    kept.sort(key=lambda record: [record[key] for key in order])
    path = folder / 'runs.csv'
    with replacing(path) as draft, open(draft, 'w', newline='') as file:
        writer = csv.DictWriter(file, _OF_A_RUN, extrasaction='ignore')
        writer.writeheader()
        for record in kept:
            cells = ((key, record.get(key)) for key in _OF_A_RUN)
            writer.writerow(
                {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in cells}
            )
