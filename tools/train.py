"""Train a detector or a segmenter."""

import argparse
import os
import os.path as osp

from mmengine.config import DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

import bcn_mm  # noqa: F401  registers the layers
from bcn_mm.runtime import (
    InputError,
    check_match,
    load_config,
    one_line_errors,
    prepare_launch,
    read_checkpoint,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/train.py CONFIG
  python tools/train.py CONFIG --resume
  python tools/train.py CONFIG --cfg-options train_dataloader.batch_size=2
  torchrun --nproc-per-node 8 tools/train.py CONFIG --launcher pytorch""",
    )
    parser.add_argument('config', help='train config file')
    parser.add_argument(
        '--work-dir',
        help="where logs and checkpoints go (default: the config's, else "
        'work_dirs/NAME_OF_THE_CONFIG)',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate from the batch size that the config '
        'states for it to the real one',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a value, from the newest in '
        'the work directory',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. model.backbone.depth=101 '
        'or model.neck.in_channels="[1,2,3]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started this process (%(default)s)',
    )
    # handed over by launchers that do not set the environment variable
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def configure(args: argparse.Namespace):
    """The config with everything that the arguments say merged in."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = osp.join(
            'work_dirs', osp.splitext(osp.basename(args.config))[0]
        )
    if args.amp:
        kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise InputError(
                f'--amp needs optim_wrapper.type=OptimWrapper, '
                f'but the config has {kind}'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise InputError(
                '--auto-scale-lr needs auto_scale_lr=dict('
                'base_batch_size=...) in the config'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    return cfg


def main() -> None:
    args = parse_args()
    with one_line_errors():
        cfg = configure(args)
        source = cfg.get('load_from')
        if cfg.get('resume') and not source:
            source = find_latest_checkpoint(cfg.work_dir)
        # wrong files are found before anything is built or written
        checkpoint = (
            read_checkpoint(source)
            if source
            and osp.splitext(source)[1] == '.pth'
            and '://' not in source
            else None
        )
        prepare_launch(cfg)
        runner = (
            RUNNERS.build(cfg)
            if 'runner_type' in cfg
            else Runner.from_cfg(cfg)
        )
        if checkpoint and cfg.get('resume'):
            check_match(runner.model, checkpoint, source)
        del checkpoint
        # so are missing annotations, and what the optimizer refuses
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.train_loop, runner.val_loop  # noqa: B018
    runner.train()


if __name__ == '__main__':
    main()
