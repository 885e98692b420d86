"""The recipes in configs/, and what their names say."""

import re

from conftest import ROOT, import_mmpretrain
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.config import Config
from torch import nn

from bcn_mm import BCN, WSConv2d

CONFIGS = [
    p
    for p in sorted((ROOT / 'configs').glob('*/*.py'))
    if p.parent.name not in ('_base_', 'new_style')
]
RECIPES = [p for p in CONFIGS if p.parent.name != 'quickstart']
# One of each task, which is tried at its own scale.
FULL = {
    'coco': 'configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py',
    'cityscapes': 'configs/deeplabv3/'
    'deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py',
}
# Their training is among the quick tests, one of each family.
QUICK = {
    'mask-rcnn_r50_fpn_bcn-ws-all_2x_coco',
    'faster-rcnn_x50-32x4d_fpn_bcn-all_1x_coco',
    'cascade-mask-rcnn_r50_fpn_bcn-ws-all_1x_coco',
    'retinanet_r50_fpn_bcn-ws-all_1x_coco',
    'fcos_r50_fpn_bcn-ws-all_1x_coco',
    'mask-rcnn_r50_fpn_bcn-ws-all_1x_cityscapes',
    'deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024',
    'deeplabv3_r101-d16_bcn-ws_8xb2-33k_voc12aug-513x513',
    'deeplabv3plus_r50-d8_bcn-ws_8xb1-80k_cityscapes-769x769',
    'pspnet_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024',
    'resnet50-bcn-ws_8xb1_in1k',
}
# what a name says -> its norm, and the convolution before it
NORMS = {
    'bcn-ws': (BCN, WSConv2d),
    'bcn': (BCN, nn.Conv2d),
    'bn-frozen': (nn.BatchNorm2d, nn.Conv2d),
    'bn': (nn.BatchNorm2d, nn.Conv2d),
    'syncbn': (nn.SyncBatchNorm, nn.Conv2d),
    'gn-ws': (nn.GroupNorm, ConvWS2d),
    'gn': (nn.GroupNorm, nn.Conv2d),
}


def norm_of(path):
    names = '|'.join(sorted(NORMS, key=len, reverse=True))
    return re.search(f'[-_]({names})(-all)?_', path.stem).group(1)


def load(path):
    """The config; skips where the package that it is for is not installed."""
    if path.parent.name == 'resnet':
        import_mmpretrain()
    return Config.fromfile(path)
