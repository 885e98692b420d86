"""The quickstart's shapes: its Mask R-CNN, and its segmenter with an FCN head."""

import argparse
import json
import os
import subprocess
import sys

from mmengine.config import Config

from bcn_mm.errors import InputError
from studies import ROOT

from .task import Extent, Run
from .trained import Trained


class Shapes(Trained):
    """Pictures that are drawn for it."""

    full = Extent(epochs=4)
    quick = Extent(epochs=1, norms=('bn', 'gn-ws', 'bcn-ws'), images=(1,), seeds=1)

    def prepare(self, args: argparse.Namespace) -> None:
        """Draw the pictures, unless they are there."""
        os.environ['SHAPES_ROOT'] = os.fspath(args.data)
        if not (args.data / 'annotations').is_dir():
            if args.show:
                raise InputError(f'no run was made with {args.data}: it is missing')
            tool = 'tools/dataset_converters/make_shapes.py'
            if subprocess.run([sys.executable, tool, args.data], cwd=ROOT).returncode:
                raise InputError(f'the pictures could not be drawn in {args.data}')

    def pictures(self, args: argparse.Namespace) -> int:
        path = args.data / 'annotations' / 'instances_train.json'
        return len(json.loads(path.read_text())['images'])


class Detection(Shapes):
    name = 'det'
    title = 'shapes, Mask R-CNN'
    error = '100 - box mAP'
    rate = 0.02
    step_cost, image_cost = 0.05, 0.12
    template = 'mask-rcnn_r18_bcn-ws_shapes.py'
    metric = ('coco/bbox_mAP', 100)

    def adapt(self, cfg: Config, run: Run) -> None:
        warmup, drop = cfg.param_scheduler  # its epochs, in steps
        warmup.end = max(1, run.steps // 16)
        drop.update(by_epoch=False, milestones=[3 * run.steps // 4])
        # without a file, of the very pictures that are shown
        cfg.val_evaluator = cfg.test_evaluator = dict(type='CocoMetric', metric='bbox')
        cfg.test_dataloader.dataset.pipeline[-1].meta_keys += ('instances',)


class Segmentation(Shapes):
    name = 'seg'
    title = 'shapes, FCN'
    error = '100 - mIoU (%)'
    rate = 0.05
    step_cost, image_cost = 0.03, 0.06
    template = 'deeplabv3_r18-d8_bcn-ws_shapes.py'
    metric = ('mIoU', 1)

    def adapt(self, cfg: Config, run: Run) -> None:
        head = cfg.model.decode_head
        cfg.model.decode_head = dict(
            cfg.model.auxiliary_head,
            in_channels=head.in_channels,
            in_index=3,
            num_convs=2,
            loss_decode=head.loss_decode,
        )
        cfg.param_scheduler[0].end = run.steps
