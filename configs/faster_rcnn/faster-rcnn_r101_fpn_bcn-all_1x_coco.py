_base_ = [
    './faster-rcnn_r50_fpn_bcn-all_1x_coco.py',
    '../_base_/backbones/r101_bn.py',
]
model = dict(backbone=_base_.r101)
