"""Draw what a detector or a segmenter finds in pictures.

By mmdet's DetInferencer or mmseg's MMSegInferencer, whichever the config is
for. Every picture is written to the output folder under its own name, as soon
as it is done.
"""

import argparse
import contextlib
import os
import tempfile
import warnings
from typing import Any, Callable, List

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from rich.console import Console
from rich.progress import track

from bcn_mm._compat import refuse_code
from bcn_mm.convert import scope_of, type_name
from bcn_mm.engine.cli import (
    add_options,
    check_folder,
    check_picture,
    find_pictures,
    load_config,
    one_line_errors,
)
from bcn_mm.errors import InputError
from bcn_mm.weights.reading import check_match, read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/demo/image_demo.py street.jpg CONFIG CHECKPOINT --out-dir out
  python tools/demo/image_demo.py FOLDER CONFIG CHECKPOINT --out-dir out \\
      --score-thr 0.5 --device cuda:0""",
    )
    parser.add_argument('images', help='a picture, or a folder of them')
    parser.add_argument('config', help='of an mmdet or mmseg model, or mmdet::...')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('--out-dir', required=True, help='where pictures are written')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='detection: the least score of what is drawn (%(default)s)',
    )
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.5,
        help='segmentation: of the colours (%(default)s)',
    )
    parser.add_argument(
        '--device',
        default='cuda:0' if torch.cuda.is_available() else 'cpu',
        help='(%(default)s)',
    )
    add_options(parser)
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Whatever can be refused before the model is built."""
    for name in ('score_thr', 'opacity'):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(
                f'--{name.replace("_", "-")} must be in [0, 1], but got '
                f'{getattr(args, name)}'
            )
    try:
        device = torch.device(args.device)
    except RuntimeError as e:
        raise InputError(f'--device {args.device}: no such device') from e
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise InputError(f'--device {args.device}: this torch sees no GPU')
    check_folder(args.out_dir, '--out-dir')
    out = os.path.abspath(args.out_dir)
    source = os.path.abspath(args.images)
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    if os.path.realpath(folder) == os.path.realpath(out):
        raise InputError(
            '--out-dir must be another folder than that of the '
            'pictures, which it would replace'
        )


def name_loaders(cfg: Config) -> None:
    """Have the pipeline's loaders as the inferencers look for them, by names.

    They replace the first and leave out that of annotations; of classes,
    mmdet's knows the first and mmseg's none.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    for step in dataset.pipeline:
        if type_name(step) in ('LoadImageFromFile', 'LoadAnnotations'):
            step.type = type_name(step)


def build(cfg: Config, args: argparse.Namespace) -> Callable[[str, str], Any]:
    """A function that draws one picture into a folder."""
    scope = scope_of(cfg)
    if scope not in ('mmdet', 'mmseg'):
        raise InputError(
            f'{args.config} is of scope {scope!r}; pictures can be drawn for '
            f'mmdet and mmseg'
        )
    if 'test_dataloader' not in cfg or 'visualizer' not in cfg:
        raise InputError(
            f'{args.config} needs test_dataloader, for what is done to '
            f'pictures, and visualizer'
        )
    name_loaders(cfg)
    refuse_code()
    checkpoint = read_checkpoint(args.checkpoint)
    MMLogger.get_current_instance().setLevel('ERROR')
    common = dict(model=cfg, weights=args.checkpoint, device=args.device)
    if scope == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(**common, show_progress=False)
        how = dict(pred_score_thr=args.score_thr)
    else:
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(**common)
        inferencer.show_progress = False
        how = dict(opacity=args.opacity)
    check_match(inferencer.model, checkpoint, args.checkpoint)
    meta = checkpoint.get('meta') or {}
    if 'dataset_meta' not in meta and 'CLASSES' not in meta:
        # bare weights: the inferencers would take COCO's, Cityscapes' classes
        known = DATASETS.build(
            dict(cfg.test_dataloader.dataset, lazy_init=True)
        ).metainfo
        names = {k: known.get(k) for k in ('classes', 'palette')}
        inferencer.model.dataset_meta.update({k: v for k, v in names.items() if v})
    return lambda file, folder: inferencer(file, out_dir=folder, **how)


def check_pictures(files: List[str]) -> None:
    """Make sure, before a model is built, that there is one to draw on."""
    for file in files:
        try:
            return check_picture(file)
        except InputError as e:
            error = e
    raise error if len(files) == 1 else damaged(files, files)


def damaged(bad: List[str], files: List[str]) -> InputError:
    names = ', '.join(map(os.path.basename, bad))
    return InputError(
        f'{len(bad)} of {len(files)} pictures are damaged or no pictures: {names}'
    )


def main() -> None:
    args = parse_args()
    console = Console()
    warnings.simplefilter('ignore')
    with one_line_errors(args.config):
        check_arguments(args)
        files = find_pictures(args.images)
        cfg = load_config(args)
        check_pictures(files)
        # what the inferencers print beside
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
            draw = build(cfg, args)
        os.makedirs(args.out_dir, exist_ok=True)
        bad = []
        for file in track(files, 'pictures', console=console):
            try:
                check_picture(file)
            except InputError:
                bad.append(file)
                continue
            # moved from there, so that no half a picture is ever seen
            with tempfile.TemporaryDirectory('.part', dir=args.out_dir) as draft:
                draw(file, draft)
                name = os.path.basename(file)
                os.replace(
                    os.path.join(draft, 'vis', name),
                    os.path.join(args.out_dir, name),
                )
        console.print(
            f'Wrote {len(files) - len(bad)} pictures to {args.out_dir}',
            soft_wrap=True,
            highlight=False,
        )
        if bad:
            raise damaged(bad, files)


if __name__ == '__main__':
    main()
