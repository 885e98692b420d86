_base_ = [
    './mask-rcnn_r50_fpn_bcn-ws-all_1x_coco.py',
    '../_base_/backbones/x50-32x4d_bcn-ws.py',
]
model = dict(backbone=_base_.x50)
