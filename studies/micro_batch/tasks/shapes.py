"""The quickstart's shapes: its Mask R-CNN, and its segmenter with an FCN head."""

import abc
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Tuple

from mmengine.config import Config

from bcn_mm.convert import walk
from bcn_mm.errors import InputError
from studies import ROOT

from .. import children
from ..norms import parse_norm
from .task import Extent, Run, Task


class Shapes(Task):
    """100 less the metric in percent, and how close channels are to elimination.

    Attributes:
        template (str): The quickstart's config that the runs' are made of.
        metric (tuple): What the metric is called in the log, and times what it
            is a percentage.
    """

    full = Extent(epochs=4)
    quick = Extent(epochs=1, norms=('bn', 'gn-ws', 'bcn-ws'), images=(1,), seeds=1)
    power = 0.5
    template: str
    metric: Tuple[str, float]

    def prepare(self, args: argparse.Namespace) -> None:
        """Draw the pictures, unless they are there."""
        os.environ['SHAPES_ROOT'] = os.fspath(args.data)
        if not (args.data / 'annotations').is_dir():
            tool = 'tools/dataset_converters/make_shapes.py'
            if subprocess.run([sys.executable, tool, args.data], cwd=ROOT).returncode:
                raise InputError(f'the pictures could not be drawn in {args.data}')

    def pictures(self, args: argparse.Namespace) -> int:
        path = args.data / 'annotations' / 'instances_train.json'
        return len(json.loads(path.read_text())['images'])

    def train(self, run: Run, folder: Path) -> dict:
        """Train by ``tools/train.py``.

        Returns:
            dict: ``error``, and what part of the channels was ``dead`` or
            ``near`` elimination at last, in percent too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / 'config.py'
        self.config(run).dump(config)
        begun = time.time()
        children.train(config, folder)
        scalars = {}
        for file in folder.glob('*/vis_data/scalars.json'):
            if file.stat().st_mtime >= begun:
                for line in file.read_text().splitlines():
                    scalars.update(json.loads(line))
        name, factor = self.metric
        # mmdet writes no metric for a model that finds nothing at all
        result = dict(error=100 - factor * scalars.get(name, 0.0))
        for key in ('dead', 'near'):  # of the norms that the hook knows
            if f'singularity/{key}' in scalars:
                result[key] = 100 * scalars[f'singularity/{key}']
        return result

    def config(self, run: Run) -> Config:
        """The quickstart's config with another norm and batch size."""
        norm = parse_norm(run.norm)
        cfg = Config.fromfile(ROOT / 'configs/quickstart' / self.template)
        self.adapt(cfg, run)
        for _, node in walk(cfg.model):
            if node.get('type') == 'BCN':
                node.clear()
                node.update(norm.norm_cfg)
            elif 'conv_cfg' in node:
                node.conv_cfg = norm.conv_cfg
        cfg.train_dataloader.update(
            batch_size=run.images, num_workers=0, persistent_workers=False
        )
        cfg.train_cfg = dict(
            type='IterBasedTrainLoop', max_iters=run.steps, val_interval=run.steps
        )
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
        cfg.train_dataloader.pop('batch_sampler', None)
        cfg.optim_wrapper.optimizer.lr = run.rate
        cfg.default_hooks.checkpoint = dict(
            type='CheckpointHook', by_epoch=False, interval=-1, save_last=False
        )
        cfg.default_hooks.logger.log_metric_by_epoch = False
        cfg.log_processor = dict(type='LogProcessor', by_epoch=False)
        cfg.custom_hooks.append(dict(type='EliminationSingularityHook'))
        cfg.randomness = dict(seed=run.seed)
        return cfg

    @abc.abstractmethod
    def adapt(self, cfg: Config, run: Run) -> None:
        """Change what one task alone does: the network, the schedule's steps."""


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
