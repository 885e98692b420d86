"""Convert every config of OpenMMLab's installed packages to BCN.

For each config, the stock model is built, the config converted, written, read
back and its model built; the norms of both are counted. For one config of each
method's folder, the one with the smallest model that does it, both models
also train two steps on random pictures (--steps). Results are kept as they
come, so that a run that was stopped goes on where it was.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from bcn_mm.engine.cli import one_line_errors

from .report import report
from .survey import survey
from .zoo import PACKAGES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m studies.zoo_survey',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples, in the folder of the repository:
  python -m studies.zoo_survey --steps
  python -m studies.zoo_survey --only "mmdet::fcos/*" --fresh
  python -m studies.zoo_survey --packages mmpretrain --json pretrain.json""",
    )
    parser.add_argument(
        '--packages',
        nargs='+',
        choices=PACKAGES,
        default=['mmdet', 'mmseg'],
        help='whose configs, by the names they are imported by (mmdet mmseg)',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=['*'],
        metavar='PATTERN',
        help='configs to look at, e.g. "mmdet::fcos/*" (default: all)',
    )
    parser.add_argument(
        '--ws', action='store_true', help='convert the convolutions too'
    )
    parser.add_argument(
        '--steps',
        action='store_true',
        help='also train two steps for one config of each folder',
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=os.cpu_count(),
        help='processes (default: one per core, %(default)s)',
    )
    parser.add_argument(
        '--timeout',
        type=int,
        default=300,
        metavar='SECONDS',
        help='for one config (%(default)s)',
    )
    parser.add_argument(
        '--json',
        type=Path,
        default=Path('work_dirs/survey_zoo.json'),
        help='where results are kept, and taken up again (%(default)s)',
    )
    parser.add_argument('--fresh', action='store_true', help='take nothing up again')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    with one_line_errors():
        content = survey(args)
    failures = report(content, console)
    console.print(f'Results are in {args.json}')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
