"""Convert checkpoints of the authors of Batch-Channel Normalization.

Their ImageNet ResNets and ResNeXts (rn50_bcn_ws.pth, rn101_bcn_ws.pth,
rx50_bcn_ws.pth) become backbones of mmdet, mmseg and mmpretrain, their
DeepLabV3 becomes mmseg's, and --reverse goes the other way. Which dialect of
weight standardization the weights were trained with is written down: a model
that was built with another one refuses them.
"""

import argparse
import os
from typing import Optional, Sequence

import torch

from bcn_mm._files import replacing
from bcn_mm.engine.cli import one_line_errors
from bcn_mm.errors import InputError
from bcn_mm.ops import DIALECTS
from bcn_mm.weights.architectures import ARCHS
from bcn_mm.weights.authors import from_authors, to_authors
from bcn_mm.weights.reading import read_checkpoint


def parse_args(words: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/model_converters/authors_to_mm.py rn50_bcn_ws.pth \\
      checkpoints/rn50_bcn_ws_mm.pth
  python tools/model_converters/authors_to_mm.py deeplab.pth deeplab_mm.pth \\
      --arch deeplabv3_resnet101
  python tools/model_converters/authors_to_mm.py epoch_24.pth theirs.pth --reverse

then, in a config:
  backbone=dict(
      norm_cfg=dict(type='BCN'), conv_cfg=dict(type='WSConv2d', dialect='var'),
      init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rn50_bcn_ws_mm.pth'))""",
    )
    parser.add_argument('source', help='the checkpoint to read')
    parser.add_argument('target', help='the checkpoint to write')
    parser.add_argument(
        '--arch',
        metavar='NAME',
        help=f'what the source must be: {", ".join(ARCHS)} (default: found out)',
    )
    parser.add_argument(
        '--dialect',
        metavar='NAME',
        help=f'of weight standardization: {", ".join(DIALECTS)}, or none for '
        f"a model without (default: as in the authors' code, var for ImageNet "
        f'models, std for others)',
    )
    parser.add_argument(
        '--reverse',
        action='store_true',
        help="from bcn_mm to the authors' layout",
    )
    parser.add_argument(
        '--inner',
        default='pbn',
        metavar='NAME',
        help='with --reverse: what the inner norms are called, pbn or bn '
        '(default: %(default)s)',
    )
    return parser.parse_args(words)


def write(checkpoint: dict, path: str) -> None:
    """Write a checkpoint, whole or not at all."""
    with replacing(path) as draft, open(draft, 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def convert(args: argparse.Namespace) -> None:
    source, target = args.source, args.target
    if os.path.isdir(target):
        raise InputError(f'target {target} is a folder; name a file')
    if args.reverse and (args.arch or args.dialect):
        raise InputError('--arch and --dialect do not go with --reverse')
    state = read_checkpoint(source)['state_dict']
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError('the target must be another file than the source')
    if not isinstance(state, dict):
        raise InputError(
            f'checkpoint {source}: its state_dict is a {type(state).__name__}'
        )
    try:
        if args.reverse:
            made = to_authors(state, args.inner)
        else:
            made = from_authors(state, args.arch, args.dialect)
    except ValueError as e:
        raise InputError(f'checkpoint {source}: {e}') from e
    write(dict(meta=made.meta, state_dict=made.state), target)
    for note in made.notes:
        print(note)
    facts = [
        f'{k}={v}'
        for k, v in made.meta.items()
        if k in ('arch', 'ws_dialect', 'num_groups')
    ]
    print(f'Wrote {target}' + (f' ({", ".join(facts)})' if facts else ''))


def main(words: Optional[Sequence[str]] = None) -> None:
    args = parse_args(words)
    with one_line_errors():
        convert(args)


if __name__ == '__main__':
    main()
