"""Train a detector or a segmenter."""

import argparse
import contextlib
import os.path as osp

from mmengine.dist import is_main_process
from mmengine.runner import Runner

from bcn_mm.convert import type_name
from bcn_mm.engine.cli import (
    add_arguments,
    check_folder,
    check_pretrained,
    load_config,
    one_line_errors,
)
from bcn_mm.engine.launch import (
    build_runner,
    find_newest_checkpoint,
    remove_drafts,
    taken_back,
)
from bcn_mm.errors import InputError
from bcn_mm.layers import BCN
from bcn_mm.weights.loading import check_dialects
from bcn_mm.weights.reading import (
    check_match,
    check_optimizer,
    check_resumable,
    check_starts,
    read_checkpoint,
    unwrapped,
)

SAVES_MEMORY = 'RecomputeActivationsHook'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/train.py CONFIG
  python tools/train.py CONFIG --save-memory
  python tools/train.py CONFIG --resume
  python tools/train.py CONFIG --cfg-options train_dataloader.batch_size=2
  torchrun --nproc-per-node 8 tools/train.py CONFIG --launcher pytorch""",
    )
    parser.add_argument(
        'config',
        help='a config file, or one of a package: mmdet::..., mmseg::..., bcn_mm::...',
    )
    add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--save-memory',
        action='store_true',
        help='compute again in the backward pass what follows from what BCN keeps '
        '(RecomputeActivationsHook): the same bits in less memory',
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
    return parser.parse_args()


def configure(args: argparse.Namespace):
    """The config with everything that the arguments say merged in."""
    cfg = load_config(args)
    if args.amp:
        kind = type_name(cfg.optim_wrapper) or 'OptimWrapper'
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise InputError(
                f'--amp needs optim_wrapper.type=OptimWrapper, '
                f'but the config has {kind}'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.save_memory:
        hooks = cfg.setdefault('custom_hooks', [])
        if all(type_name(hook) != SAVES_MEMORY for hook in hooks):
            hooks.append(dict(type=SAVES_MEMORY))
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise InputError(
                '--auto-scale-lr needs auto_scale_lr=dict('
                'base_batch_size=...) in the config'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    return cfg


def read_start(cfg) -> dict:
    """The checkpoint that a training goes on from, if it is a local file.

    Read whatever it is called, so that wrong ones are found before anything
    is built or written.
    """
    source = cfg.get('load_from')
    if not source or '://' in source:
        return None
    # what some strategies write, and FlexibleRunner reads
    if osp.isdir(source) and 'runner_type' in cfg:
        return None
    checkpoint = read_checkpoint(source)
    if cfg.get('resume') and 'runner_type' not in cfg:
        check_resumable(checkpoint, source)
    return checkpoint


def check_norms(cfg, model) -> None:
    """Make sure that a BCN at the top of a config is the norm of something.

    There it is a variable, which the base configs have put to use before it is
    given another value.
    """
    asked = type_name(cfg.get('norm_cfg'))
    if asked in ('BCN', 'SyncBCN') and not any(
        isinstance(layer, BCN) for layer in model.modules()
    ):
        raise InputError(
            f'norm_cfg at the top of the config is {asked}, but no norm of the model '
            f'is: give it to the components (model=dict(backbone=dict(norm_cfg='
            f"dict(type='{asked}')))), or convert the config "
            f'(python tools/misc/bcn_config.py CONFIG -o NEW_CONFIG)'
        )


def main() -> None:
    args = parse_args()
    with one_line_errors(args.config), contextlib.ExitStack() as stack:
        cfg = configure(args)
        check_folder(cfg.work_dir, '--work-dir')
        check_pretrained(cfg)
        if cfg.get('resume') and not cfg.get('load_from'):
            cfg.load_from = find_newest_checkpoint(cfg.work_dir)
        checkpoint = read_start(cfg)
        stack.enter_context(taken_back(cfg.work_dir, cfg.filename))
        runner = build_runner(cfg)
        if isinstance(runner, Runner):  # FlexibleRunner builds all later
            check_norms(cfg, runner.model)
            if checkpoint and cfg.get('resume'):
                check_match(runner.model, checkpoint, cfg.load_from)
            elif checkpoint:
                check_dialects(unwrapped(runner.model), checkpoint['state_dict'])
            check_starts(runner.model)
            # missing annotations too, and what the optimizer refuses
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            if checkpoint and cfg.get('resume'):
                check_optimizer(runner.optim_wrapper, checkpoint, cfg.load_from)
            runner.train_loop, runner.val_loop  # noqa: B018
        del checkpoint
    if is_main_process():
        remove_drafts(cfg.work_dir)
    with one_line_errors(args.config, only=InputError):  # a full disk
        runner.train()


if __name__ == '__main__':
    main()
