"""Test (and evaluate) a detector or a segmenter."""

import argparse
import contextlib
import copy
import os.path as osp

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from bcn_mm.convert import scope_of, type_name
from bcn_mm.engine.cli import (
    add_arguments,
    check_file,
    check_folder,
    claim_folder,
    load_config,
    one_line_errors,
)
from bcn_mm.engine.launch import build_runner, taken_back
from bcn_mm.errors import InputError
from bcn_mm.weights.reading import check_match, read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/test.py CONFIG work_dirs/NAME/epoch_24.pth
  python tools/test.py CONFIG CHECKPOINT --show-dir out --work-dir metrics
  python tools/test.py CONFIG CHECKPOINT --out predictions.pkl""",
    )
    parser.add_argument(
        'config',
        help='a config file, or one of a package: mmdet::..., mmseg::..., bcn_mm::...',
    )
    parser.add_argument('checkpoint', help='checkpoint file')
    add_arguments(parser)
    parser.add_argument(
        '--out',
        help='where predictions go: a .pkl file, or for segmentation also a '
        'folder for label maps',
    )
    parser.add_argument(
        '--show', action='store_true', help='show predictions on screen'
    )
    parser.add_argument(
        '--show-dir',
        help='where pictures of the predictions beside the truth go',
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds that --show leaves a picture (%(default)s)',
    )
    parser.add_argument('--tta', action='store_true', help='augment at test time')
    return parser.parse_args()


def visualize(cfg: Config, args: argparse.Namespace) -> None:
    """Have mmdet's or mmseg's visualization hook draw every picture."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise InputError(
            '--show and --show-dir need default_hooks.visualization in the config'
        )
    hook.draw = True
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    folder = osp.abspath(args.show_dir) if args.show_dir else None
    if type_name(hook).endswith('SegVisualizationHook'):
        hook.interval = 1  # every picture, as mmdet's hook does
        if folder:
            cfg.visualizer.save_dir = folder
    elif folder:
        hook.test_out_dir = folder


def augment(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, by default with flips."""
    if cfg.model.get('mask_head') or cfg.model.get('roi_head', {}).get('mask_head'):
        raise InputError('--tta: mmdet cannot merge masks of augmented views')
    if 'tta_model' not in cfg:
        if scope_of(cfg) != 'mmdet':
            raise InputError('--tta needs tta_model in the config')
        cfg.tta_model = ConfigDict(
            type='DetTTAModel',  # which mmdet registers in the root
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        if scope_of(cfg) != 'mmdet':
            raise InputError('--tta needs tta_pipeline in the config')
        *load, pack = copy.deepcopy(dataset.pipeline)
        pack.meta_keys = (
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        )
        flips = [dict(type='mmdet.RandomFlip', prob=p) for p in (1.0, 0.0)]
        cfg.tta_pipeline = load + [dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    # not by **, which makes classes that cannot be written of lazy ones
    wrapper = copy.deepcopy(cfg.tta_model)
    wrapper.module = cfg.model
    cfg.model = wrapper


def dumps(out: str) -> bool:
    """Whether predictions go to one file, and not to a folder."""
    return out.endswith(('.pkl', '.pickle'))


def check_outputs(cfg: Config, args: argparse.Namespace) -> None:
    """Make sure, before anything is built, that results can be written."""
    check_folder(cfg.work_dir, '--work-dir')
    if args.show_dir:
        check_folder(args.show_dir, '--show-dir')
    if not args.out:
        return
    if dumps(args.out):
        check_file(args.out, '--out')
        return
    if scope_of(cfg) != 'mmseg':
        raise InputError(f'--out must be a .pkl file, but got {args.out}')
    if not isinstance(cfg.test_evaluator, dict):
        raise InputError('--out with a folder needs a single test_evaluator')
    check_folder(args.out, '--out')
    cfg.test_evaluator.update(output_dir=args.out, keep_results=True)


def dump_metric(cfg: Config, out: str) -> DumpResults:
    """What writes predictions, by the runner's backend: whole or not at all."""
    if scope_of(cfg) == 'mmdet':  # whose own also compresses masks
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=out)
    return DumpResults(out_file_path=out)


def main() -> None:
    args = parse_args()
    with one_line_errors(args.config), contextlib.ExitStack() as stack:
        cfg = load_config(args)
        cfg.load_from, cfg.resume = args.checkpoint, False
        check_outputs(cfg, args)
        local = '://' not in args.checkpoint
        checkpoint = read_checkpoint(args.checkpoint) if local else None
        if args.show or args.show_dir:
            visualize(cfg, args)
        if args.tta:
            augment(cfg)
        stack.enter_context(taken_back(cfg.work_dir, cfg.filename))
        runner = build_runner(cfg)
        if local:
            model = getattr(runner.model, 'module', runner.model)
            model = getattr(model, 'module', model) if args.tta else model
            check_match(model, checkpoint, args.checkpoint)
        del checkpoint
        runner.test_loop  # noqa: B018  finds missing annotations
        if is_main_process():  # the only one that writes
            if args.show_dir:
                claim_folder(args.show_dir, '--show-dir')
            if args.out:
                folder = osp.dirname(osp.abspath(args.out))
                claim_folder(folder if dumps(args.out) else args.out, '--out')
        if args.out and dumps(args.out):
            runner.test_evaluator.metrics.append(dump_metric(cfg, args.out))
    with one_line_errors(args.config, only=InputError):  # a full disk
        runner.test()


if __name__ == '__main__':
    main()
