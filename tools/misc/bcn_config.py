"""Make a BCN config of a stock config, and say what was changed.

Every BatchNorm, SyncBN and GroupNorm of the model becomes BCN, those that its
components take by default included, with the eps that the config gives it;
norm_eval and frozen stages are turned off, checkpoints that no longer fit are
dropped, and heads that pyramid levels share get an estimate for each level.
What is written inherits from the source and says only what differs.
"""

import argparse
import difflib
import os
import os.path as osp
import sys
import warnings
from collections import Counter
from contextlib import redirect_stdout
from typing import Any, List, Optional, Sequence, Tuple

from mmengine.config import Config
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm
from rich.table import Table

from bcn_mm.convert import (
    PARTS,
    Change,
    build_model,
    check_target,
    describe,
    in_scope,
    leftovers,
    part_of,
    to_bcn,
    write_config,
)
from bcn_mm.engine.cli import Options, one_line_errors, read_file
from bcn_mm.errors import InputError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/misc/bcn_config.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py \\
      -o configs/my/retinanet_bcn.py --ws --batch-size 1
  python tools/misc/bcn_config.py configs/my/stock.py -o configs/my/bcn.py \\
      --only backbone,neck --norm-cfg type=SyncBCN""",
    )
    parser.add_argument(
        'source', help='a config file, or one of a package: mmdet::..., mmseg::...'
    )
    parser.add_argument('-o', '--out', required=True, help='the config to write, *.py')
    parser.add_argument(
        '--force', action='store_true', help='replace --out if it exists, unasked'
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='show what would change, write nothing'
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        '--diff',
        action='store_true',
        help='show the whole configs, line by line, instead of the table',
    )
    shown.add_argument('-q', '--quiet', action='store_true', help='show nothing')
    parser.add_argument(
        '--ws',
        action='store_true',
        help='standardize the weights of the convolutions before these norms',
    )
    parser.add_argument(
        '--only',
        type=lambda text: [w.strip() for w in text.split(',') if w.strip()],
        metavar='PART,...',
        help=f'parts to convert, of {", ".join(PARTS)} (default: all)',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        help='images per GPU; the learning rates are scaled with it '
        '(default: as in the source)',
    )
    parser.add_argument(
        '--keep-epochs',
        action='store_true',
        help='with --batch-size: stretch what counts iterations (max_iters, '
        'schedules, checkpoints), so that training sees as many pictures as before',
    )
    parser.add_argument(
        '--pretrained',
        metavar='CHECKPOINT',
        help='weights of the backbone, trained with BCN; frozen stages then '
        'stay frozen',
    )
    parser.add_argument(
        '--norm-cfg',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help='what replaces the norms: of type BCN (the default) or SyncBCN',
    )
    return parser.parse_args()


def norms_left(cfg: Config, only: Optional[Sequence[str]]) -> List[Change]:
    """What the conversion did not reach, one entry per part and kind."""
    with in_scope(cfg) as registry:
        model = build_model(cfg.model, registry)
    rows = []
    for kind, names in leftovers(model).items():
        for part, count in Counter(n.split('.')[0] for n in names).items():
            left_out = only and part_of(part) not in only
            note = 'not in --only' if left_out else 'built without asking the config'
            text = f'{count} x {kind}'
            rows.append(Change(f'model.{part}', text, text, note))
    return rows


def show(value: Any) -> str:
    if isinstance(value, dict):
        return f'dict({", ".join(f"{k}={show_inner(v)}" for k, v in value.items())})'
    return 'none' if value is None else str(value)


def show_inner(value: Any) -> str:
    if isinstance(value, (dict, type)):
        return show(value) if isinstance(value, dict) else value.__name__
    if isinstance(value, list):
        return f'[{", ".join(map(show_inner, value))}]'
    return repr(value)


def show_both(change: Change) -> Tuple[str, str]:
    """What was, and what is; of a list that was continued, what was added."""
    before, after = change.before, change.after
    if before == after:
        return show(before), '(left alone)'
    if isinstance(after, list):
        old = list(before or ())
        if after[: len(old)] == old:
            added = ', '.join(map(show_inner, after[len(old) :]))
            return (f'{len(old)} of them', f'and {added}') if old else ('none', added)
    return show(before), show(after)


def table_of(changes: List[Change], title: str) -> Table:
    table = Table(title=title, box=box.HORIZONTALS, show_lines=True)
    for heading in ('setting', 'before', 'after', 'note'):
        table.add_column(heading, overflow='fold')
    for change in changes:
        row = (change.path, *show_both(change), change.note)
        table.add_row(*map(escape, row))
    return table


def differing_lines(stock: Config, cfg: Config, names: Tuple[str, str]) -> str:
    """The two configs, in full, as ``diff -u`` shows them."""
    texts = [c.pretty_text.splitlines() for c in (stock, cfg)]
    return '\n'.join(difflib.unified_diff(*texts, *names, lineterm=''))


def may_replace(path: str) -> bool:
    """Ask whoever is there."""
    if not sys.stdin.isatty():
        raise InputError(f'{path} exists; --force replaces it')
    return Confirm.ask(f'{escape(path)} exists. Replace it?', default=False)


def main() -> None:
    args = parse_args()
    console = Console(quiet=args.quiet)
    if not console.is_terminal and not os.environ.get('COLUMNS'):
        console.width = 10_000  # a pipe folds nothing
    warnings.simplefilter('ignore')
    # stdout is the result's alone; configs and packages may print as they are read
    with one_line_errors(), redirect_stdout(sys.stderr):
        if not args.out.endswith('.py'):
            raise InputError(f'--out must be a .py file, but got {args.out}')
        if args.keep_epochs and args.batch_size is None:
            raise InputError('--keep-epochs needs --batch-size')
        stock = read_file(args.source)
        check_target(args.source, args.out)
        exists = osp.exists(args.out) and not args.dry_run
        if exists and not args.force and not may_replace(args.out):
            return
        changes: List[Change] = []
        cfg = to_bcn(
            stock,
            norm_cfg=args.norm_cfg,
            ws=args.ws,
            only=args.only,
            batch_size=args.batch_size,
            keep_epochs=args.keep_epochs,
            pretrained=args.pretrained,
            changes=changes,
        )
        try:
            told = {(change.path, change.note) for change in changes}
            for change in norms_left(cfg, args.only):
                if (change.path, change.note) not in told:
                    changes.append(change)
        except Exception as e:
            raise InputError(
                f'the converted model cannot be built: {describe(e)}'
            ) from e
        if not args.dry_run:
            write_config(cfg, args.source, args.out)
    if args.diff:
        console.print(
            differing_lines(stock, cfg, (args.source, args.out)),
            markup=False,
            soft_wrap=True,
        )
    elif changes:
        console.print(table_of(changes, escape(f'{args.source} -> {args.out}')))
    if cfg.to_dict() == stock.to_dict():
        console.print('Nothing to change.')
    done = 'Nothing was written.' if args.dry_run else f'Wrote {args.out}'
    console.print(done, soft_wrap=True, markup=False)


if __name__ == '__main__':
    main()
