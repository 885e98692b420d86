"""Draw what EliminationSingularityHook logged: layers by training steps.

Two panels for each run: the lowest margin (mean / standard deviation of the
pre-activation) of a layer's channels, where -3 is a channel that is hardly
ever active, and the percentage of its channels that are dead. Layers are in
the order in which they run. The hook draws the same at the end of training;
this can be used while it is going on, and draws several runs side by side.
"""

import argparse
import glob
import json
import os.path as osp
from typing import List

from bcn_mm.engine.cli import one_line_errors
from bcn_mm.errors import InputError
from bcn_mm.hooks.singularity import PREFIX, History, draw_history

HOOK = 'EliminationSingularityHook'


def find_log(run: str) -> str:
    """The scalars of a run: the file itself, or a folder's newest.

    Raises:
        InputError: if there is none.
    """
    if osp.isfile(run):
        return run
    if not osp.isdir(run):
        raise InputError(f'there is no file or folder {run}')
    base = glob.escape(run)
    found = [
        path
        for pattern in ('', 'vis_data', osp.join('*', 'vis_data'))
        for path in glob.glob(osp.join(base, pattern, 'scalars.json'))
    ]
    if not found:
        raise InputError(
            f'{run} has no vis_data/scalars.json: it is no work directory of '
            f'a training with the LocalVisBackend'
        )
    return max(found, key=osp.getmtime)


def read_log(path: str) -> History:
    """What the hook wrote to a log, by increasing step.

    Raises:
        InputError: if there is nothing, or a line cannot be read.
    """
    with open(path, errors='replace') as file:
        lines = file.readlines()
    history = {}
    for number, line in enumerate(lines, 1):
        if PREFIX not in line:
            continue
        try:
            record = json.loads(line)
            tags = {k: v for k, v in record.items() if k.startswith(PREFIX)}
            step = record['step']
        except (ValueError, KeyError, AttributeError) as e:
            if number == len(lines) and not line.endswith('\n'):
                break  # a training is just writing it
            raise InputError(f'{path}, line {number}, is damaged: {e}') from e
        if tags:
            history[step] = tags
    if not history:
        raise InputError(
            f'{path} has nothing of {HOOK}: train with '
            f"custom_hooks=[dict(type='{HOOK}')], and longer than its interval"
        )
    return sorted(history.items())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/analysis_tools/plot_singularity.py work_dirs/NAME
  python tools/analysis_tools/plot_singularity.py work_dirs/gn work_dirs/bcn \\
      --labels GN BCN --out gn-bcn.png""",
    )
    parser.add_argument(
        'runs',
        nargs='+',
        metavar='RUN',
        help='a work directory, of which the newest log is taken, or a scalars.json',
    )
    parser.add_argument(
        '--labels',
        nargs='+',
        metavar='LABEL',
        help='what to call the runs, one for each (if there are several: their names)',
    )
    parser.add_argument(
        '--out',
        default='singularity.png',
        metavar='FILE.png',
        help='(%(default)s)',
    )
    return parser.parse_args()


def label_runs(runs: List[str]) -> List[str]:
    if len(runs) == 1:
        return ['']
    return [osp.basename(osp.abspath(run)) for run in runs]


def main() -> None:
    args = parse_args()
    with one_line_errors():
        labels = args.labels or label_runs(args.runs)
        if len(labels) != len(args.runs) or len(set(labels)) != len(labels):
            raise InputError(
                f'{len(args.runs)} runs need as many different --labels, got '
                f'{", ".join(labels)}'
            )
        if not args.out.endswith('.png'):
            raise InputError(f'--out {args.out} does not end in .png')
        histories = [read_log(find_log(run)) for run in args.runs]
        draw_history(dict(zip(labels, histories)), args.out)
        print(args.out)


if __name__ == '__main__':
    main()
