_base_ = [
    './mask-rcnn_r50-jhu_fpn_bcn-ws-all_2x_coco.py',
    '../_base_/backbones/x50-32x4d_jhu.py',
]
model = dict(backbone=_base_.x50)
