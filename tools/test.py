"""Test (and evaluate) a detector or a segmenter."""

import argparse
import contextlib
import copy
import os.path as osp

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.registry import METRICS

from bcn_mm._files import replacing
from bcn_mm.engine.cli import add_arguments, load_config, one_line_errors
from bcn_mm.engine.launch import build_runner
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
    parser.add_argument('config', help='test config file')
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
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise InputError(
            '--show and --show-dir need default_hooks.visualization in the config'
        )
    hook.draw = True
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    folder = osp.abspath(args.show_dir) if args.show_dir else None
    if hook.type.endswith('SegVisualizationHook'):
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
        if cfg.get('default_scope') != 'mmdet':
            raise InputError('--tta needs tta_model in the config')
        cfg.tta_model = ConfigDict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        if cfg.get('default_scope') != 'mmdet':
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
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        cfg.tta_pipeline = load + [dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def add_dump(cfg: Config, out: str) -> None:
    """Have predictions written below ``out``."""
    scope = cfg.get('default_scope')
    if out.endswith(('.pkl', '.pickle')):
        mmengine.mkdir_or_exist(osp.dirname(osp.abspath(out)))
        return
    if scope != 'mmseg':
        raise InputError(f'--out must be a .pkl file, but got {out}')
    if not isinstance(cfg.test_evaluator, dict):
        raise InputError('--out with a folder needs a single test_evaluator')
    cfg.test_evaluator.update(output_dir=out, keep_results=True)


def main() -> None:
    args = parse_args()
    with contextlib.ExitStack() as stack:
        with one_line_errors():
            cfg = load_config(args)
            cfg.load_from, cfg.resume = args.checkpoint, False
            local = '://' not in args.checkpoint
            checkpoint = read_checkpoint(args.checkpoint) if local else None
            if args.show or args.show_dir:
                visualize(cfg, args)
            if args.tta:
                augment(cfg)
            if args.out:
                add_dump(cfg, args.out)
            runner = build_runner(cfg)
            if local:
                model = getattr(runner.model, 'module', runner.model)
                model = getattr(model, 'module', model) if args.tta else model
                check_match(model, checkpoint, args.checkpoint)
            del checkpoint
            runner.test_loop  # noqa: B018  finds missing annotations
            if args.out and args.out.endswith(('.pkl', '.pickle')):
                dump = args.out
                if is_main_process():  # the only one that writes
                    dump = stack.enter_context(replacing(dump, '.part.pkl'))
                # mmdet's own also compresses masks
                kind = (
                    METRICS.get('mmdet.DumpDetResults')
                    if cfg.get('default_scope') == 'mmdet'
                    else DumpResults
                )
                runner.test_evaluator.metrics.append(kind(out_file_path=dump))
        runner.test()


if __name__ == '__main__':
    main()
