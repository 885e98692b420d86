"""What runs gave: a file for each, and what they say together."""

import csv
import json
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np

from bcn_mm._files import replacing, write_json

from .tasks import Run

#: Of a row: task, norm, images per step.
Key = Tuple[str, str, int]


def keep(run: Run, record: dict, folder: Path) -> None:
    """Keep what a run gave, for :func:`known`."""
    write_json(_path(run, folder), record)


def known(run: Run, folder: Path) -> dict:
    """The record of a run that is done, as it is asked for now; else empty."""
    try:
        record = json.loads(_path(run, folder).read_text())
    except (OSError, ValueError):
        return {}
    same = all(record.get(k) == v for k, v in run._asdict().items())
    return record if same and record.get('error') is not None else {}


def _path(run: Run, folder: Path) -> Path:
    return folder / 'runs' / f'{run.name}.json'


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
            dead=_mean_of('dead', members),
            near=_mean_of('near', members),
        )
    return rows


def _mean_of(key: str, members: List[dict]):
    values = [r[key] for r in members if key in r]
    return float(np.mean(values)) if values else None


def write_csv(rows: Dict[Key, dict], path: Path) -> None:
    """Write what :func:`summarize` returns."""
    with replacing(path) as draft, open(draft, 'w', newline='') as file:
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
