"""Photographs in COCO's layout, and a Mask R-CNN that is to fit them."""

import argparse
import json
import os
from pathlib import Path

from mmengine.config import Config

from bcn_mm.errors import InputError

from .shapes import Detection
from .task import Extent, Run

SCALE = (400, 320)
_ANNOTATIONS = Path('annotations', 'instances_train2017.json')


class Photos(Detection):
    """100 less the box mAP on the very pictures that are trained on.

    Who optimizes: it says nothing about other pictures. So the rate is chosen by
    the same figure, and nothing is held out.
    """

    name = 'photos'
    title = 'fitting photographs, Mask R-CNN'
    error = '100 - box mAP on the training pictures'
    full = Extent(72, ('bn', 'gn', 'gn-ws', 'bcn', 'bcn-ws'), images=(1,))
    quick = Extent(1, ('bn', 'gn-ws', 'bcn-ws'), images=(1,), seeds=1)
    step_cost, image_cost = 0.05, 0.3
    holdout = 0

    def prepare(self, args: argparse.Namespace) -> None:
        if not (args.photo_data / _ANNOTATIONS).is_file():
            raise InputError(
                f'{args.photo_data / _ANNOTATIONS} is missing: --photo-data names '
                f"a folder in COCO's layout"
            )
        os.environ['PHOTOS_ROOT'] = os.fspath(args.photo_data)

    def pictures(self, args: argparse.Namespace) -> int:
        data = json.loads((args.photo_data / _ANNOTATIONS).read_text())
        return len(data['images'])

    def adapt(self, cfg: Config, run: Run) -> None:
        super().adapt(cfg, run)
        root = Path(os.environ['PHOTOS_ROOT'])
        for loader in (cfg.train_dataloader, cfg.test_dataloader):
            loader.dataset.update(
                data_root=os.fspath(root),
                ann_file=os.fspath(_ANNOTATIONS),
                data_prefix=dict(img='train2017/'),
            )
            loader.dataset.pop('metainfo')
            loader.dataset.pop('filter_cfg', None)
            for step in loader.dataset.pipeline:
                if step.type == 'Resize':
                    step.clear()
                    step.update(type='Resize', scale=SCALE, keep_ratio=True)
        cfg.train_dataloader.dataset.pipeline.insert(
            2, dict(type='Resize', scale=SCALE, keep_ratio=True)
        )
        for head in (cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
            head.num_classes = 80
