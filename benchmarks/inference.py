"""Time inference of a model with BCN, folded and not, beside GroupNorm.

Builds a detector's backbone and neck, or a segmenter, once with GroupNorm and
plain convolutions, once with BCN and Weight Standardization and once with
these folded (bcn_mm.deploy.fold), and lets them see the same random picture
in turn.
"""

import argparse
import logging

import torch
from measuring import (
    WARMUP,
    Clock,
    add_arguments,
    draw_bars,
    interleave,
    prepare,
)
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from swapping import swap

from bcn_mm._files import write_json
from bcn_mm.deploy import Deployed, Folding, fold
from bcn_mm.engine.cli import Options, load_config, one_line_errors
from bcn_mm.engine.progress import progress_bar
from bcn_mm.errors import InputError

BASE = 'GN'
VARIANTS = {
    BASE: (dict(type='GN', num_groups=32), None),
    'BCN + WSConv2d': (dict(type='BCN'), dict(type='WSConv2d')),
}
FOLDED = 'BCN, folded'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python benchmarks/inference.py \\
      configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py
  python benchmarks/inference.py CONFIG --shape 512 1024 \\
      --rounds 20 --out inference.json""",
    )
    parser.add_argument('config', help='of an mmdet or mmseg model')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(400, 640),
        metavar=('H', 'W'),
        help='of the picture (400 640)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    add_arguments(parser, rounds=10)
    args = parser.parse_args()
    # what load_config asks for beside these
    args.work_dir, args.launcher, args.local_rank = None, 'none', 0
    return args


def main() -> None:
    args = parse_args()
    with one_line_errors():
        machine = prepare(args)
        if min(args.shape) < 32:
            raise InputError('--shape must be at least 32 32')
        cfg = load_config(args)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        picture = torch.randn(1, 3, *args.shape, device=args.device)
        models, report = {}, []
        for name, (norm_cfg, conv_cfg) in VARIANTS.items():
            model = MODELS.build(swap(cfg, norm_cfg, conv_cfg))
            models[name] = Deployed(model.to(args.device).eval())
        models[FOLDED] = fold(models['BCN + WSConv2d'], picture, report=report)
        clock = Clock(args.device)

        def timed(model):
            def step():
                with torch.inference_mode():
                    stamps = [clock.stamp()]
                    model(picture)
                    stamps.append(clock.stamp())
                return clock.seconds(stamps)

            return step

        with progress_bar() as bar:
            task = bar.add_task('rounds', total=WARMUP + args.rounds)
            times = interleave(
                {name: timed(model) for name, model in models.items()},
                args.rounds,
                lambda: bar.advance(task),
            )
    seconds = {name: float(t[0]) for name, t in times.items()}
    show(seconds, report, args.shape)
    Console().print(', '.join(f'{k} {v}' for k, v in machine.items()))
    if args.plot:
        ratios = {k: [s / seconds[BASE]] for k, s in seconds.items() if k != BASE}
        title = f'seconds a picture of {args.shape[1]}x{args.shape[0]}, times {BASE}'
        draw_bars(args.plot, ['inference'], ratios, title)
    if args.out:
        settings = dict(config=args.config, shape=tuple(args.shape))
        write_json(
            args.out,
            dict(machine=machine, settings=settings, seconds=seconds),
        )


def show(seconds: dict, report: 'list[Folding]', shape) -> None:
    """A table of times and ratios."""
    folded = sum(bool(f.norm and f.conv) for f in report)
    table = Table(
        title=f'inference, one picture of {shape[1]}x{shape[0]}',
        caption=f'{folded} norms folded',
    )
    table.add_column('model', no_wrap=True)
    for heading in ('s/picture', 'ratio'):
        table.add_column(heading, justify='right')
    for name, value in seconds.items():
        ratio = value / seconds[BASE]
        table.add_row(name, f'{value:.4f}', f'{ratio:.3f}')
    Console().print(table)


if __name__ == '__main__':
    main()
