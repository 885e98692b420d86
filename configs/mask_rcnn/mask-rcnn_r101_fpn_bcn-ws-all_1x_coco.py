_base_ = [
    './mask-rcnn_r50_fpn_bcn-ws-all_1x_coco.py',
    '../_base_/backbones/r101_bcn-ws.py',
]
model = dict(backbone=_base_.r101)
