"""Make a BCN config of a stock config, and say what was changed.

Every BatchNorm, SyncBN and GroupNorm of the model becomes BCN, those that its
components take by default included, with the eps that the config gives it;
norm_eval and frozen stages are turned off, checkpoints that no longer fit are
dropped, and heads that pyramid levels share get an estimate for each level.
What is written inherits from the source and says only what differs.
"""

import argparse
import os.path as osp
import warnings
from collections import Counter
from typing import List, Optional, Sequence

from mmengine.config import Config, DictAction
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bcn_mm.convert import (
    PARTS,
    Change,
    build_model,
    describe,
    in_scope,
    leftovers,
    part_of,
    read_config,
    to_bcn,
    write_config,
)
from bcn_mm.engine.cli import one_line_errors
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
        help='images per GPU; the learning rate is scaled with it '
        '(default: as in the source)',
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
        action=DictAction,
        metavar='KEY=VALUE',
        help='what replaces the norms (default: type=BCN)',
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


def show(value) -> str:
    if isinstance(value, dict):
        return f'dict({", ".join(f"{k}={v!r}" for k, v in value.items())})'
    return 'none' if value is None else str(value)


def table_of(changes: List[Change], title: str) -> Table:
    table = Table(title=title, box=box.HORIZONTALS, show_lines=True)
    for heading in ('setting', 'before', 'after', 'note'):
        table.add_column(heading, overflow='fold')
    for change in changes:
        same = change.before == change.after
        after = '(left alone)' if same else show(change.after)
        table.add_row(
            escape(change.path),
            escape(show(change.before)),
            escape(after),
            escape(change.note),
        )
    return table


def main() -> None:
    args = parse_args()
    console = Console()
    warnings.simplefilter('ignore')
    with one_line_errors():
        if not args.out.endswith('.py'):
            raise InputError(f'--out must be a .py file, but got {args.out}')
        if osp.abspath(args.out) == osp.abspath(args.source):
            raise InputError('--out must be another file than the source')
        changes = []
        stock = read_config(args.source)
        cfg = to_bcn(
            stock,
            norm_cfg=args.norm_cfg,
            ws=args.ws,
            only=args.only,
            batch_size=args.batch_size,
            pretrained=args.pretrained,
            changes=changes,
        )
        try:
            changes += norms_left(cfg, args.only)
        except Exception as e:
            raise InputError(
                f'the converted model cannot be built: {describe(e)}'
            ) from e
        write_config(cfg, args.source, args.out)
    if changes:
        console.print(table_of(changes, f'{args.source} -> {args.out}'))
    if cfg.to_dict() == stock.to_dict():
        console.print('Nothing to change.')
    console.print(f'Wrote {args.out}', soft_wrap=True)


if __name__ == '__main__':
    main()
