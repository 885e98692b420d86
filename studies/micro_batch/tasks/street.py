"""Street scenes in Cityscapes' layout, and a DeepLabV3 from random weights."""

import argparse
import functools
import os
from pathlib import Path
from typing import Tuple

import cv2
import numpy as np
from mmengine.config import Config

from bcn_mm.errors import InputError

from ..norms import parse_norm
from .task import Extent, Run
from .trained import Trained

# Of pictures: width, height.
SCALE = (480, 360)
# One in so many pictures is drawn with what is predicted.
DRAWN = 10
_LABELS = '_gtFine_labelTrainIds.png'


class Street(Trained):
    """DeepLabV3 with a ResNet-18 of half width, output stride 16.

    Attributes:
        crop (tuple[int]): Of what is trained on, width and height.
        windows (bool): Whether pictures are tested in windows of that size, unless
            the norm's settings say otherwise.
    """

    name = 'street'
    title = 'street scenes, DeepLabV3'
    error = '100 - mIoU (%)'
    full = Extent(16, ('bn', 'gn', 'gn-ws', 'bcn', 'bcn-ws'), images=(1,))
    quick = Extent(2, ('bn', 'gn-ws', 'bcn-ws'), images=(1,), seeds=1)
    rate = 0.02
    step_cost, image_cost = 0.02, 0.28
    template = 'deeplabv3_r18-d8_bcn-ws_shapes.py'
    metric = ('mIoU', 1)
    evaluations = 4
    crop = (384, 288)
    windows = False
    settings = ('windows',)

    def prepare(self, args: argparse.Namespace) -> None:
        for part in ('leftImg8bit', 'gtFine'):
            if not (args.street_data / part).is_dir():
                raise InputError(
                    f'{args.street_data}/{part} is missing: --street-data names '
                    f"a folder in Cityscapes' layout"
                )
        os.environ['STREET_ROOT'] = os.fspath(args.street_data)

    def pictures(self, args: argparse.Namespace) -> int:
        return len(_labels(args.street_data))

    def adapt(self, cfg: Config, run: Run) -> None:
        root = Path(os.environ['STREET_ROOT'])
        names, palette = classes(root)
        scale = dict(type='Resize', scale=SCALE, keep_ratio=True)
        cfg.train_dataloader.dataset.pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(
                type='RandomResize',
                scale=SCALE,
                ratio_range=(0.8, 1.25),
                keep_ratio=True,
            ),
            dict(type='RandomCrop', crop_size=self.crop[::-1]),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackSegInputs'),
        ]
        cfg.test_dataloader.dataset.pipeline = [
            dict(type='LoadImageFromFile'),
            scale,
            # as it is, to be compared with at its own size
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ]
        for loader, split in (
            (cfg.train_dataloader, 'train'),
            (cfg.test_dataloader, 'val'),
        ):
            loader.dataset.update(
                type='CityscapesDataset',
                data_root=os.fspath(root),
                metainfo=dict(classes=names, palette=palette),
                data_prefix=dict(
                    img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'
                ),
            )
        cfg.default_hooks.visualization = dict(
            type='SegVisualizationHook', draw=True, interval=DRAWN
        )
        cfg.param_scheduler[0].end = run.steps
        if parse_norm(run.norm).settings.get('windows', self.windows):
            height_width = self.crop[::-1]
            cfg.model.test_cfg = dict(
                mode='slide',
                crop_size=height_width,
                stride=[2 * length // 3 for length in height_width],
            )
        self.network(cfg, run)
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            if head:
                head.num_classes = len(names)
                head.loss_decode.pop('class_weight', None)

    def network(self, cfg: Config, run: Run) -> None:
        """Change the quickstart's."""
        cfg.model.backbone.update(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
        if run.norm == 'bn':
            # which refuses the one value per channel of the image pooling
            cfg.model.decode_head.norm_cfg = parse_norm('gn').norm_cfg


def _labels(root: Path) -> list:
    return sorted((root / 'gtFine' / 'train').glob(f'*/*{_LABELS}'))


@functools.lru_cache(maxsize=None)
def classes(root: Path) -> Tuple[list, list]:
    """Names and colours of the classes that pictures to train on have.

    Others would count, with an IoU of 0, where a network predicts them, and
    not at all where it does not.
    """
    from mmseg.datasets import CityscapesDataset

    known = CityscapesDataset.METAINFO
    seen = set()
    for file in _labels(root):
        seen.update(np.unique(cv2.imread(str(file), cv2.IMREAD_UNCHANGED)).tolist())
    found = [k for k in range(len(known['classes'])) if k in seen]
    return tuple([known[key][k] for k in found] for key in ('classes', 'palette'))
