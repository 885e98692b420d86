# Starts by itself: from mmdet's own GroupNorm + WS backbone, whose affine pairs go
# into BCN's batch stage, in its dialect of Weight Standardization.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py'
conv_cfg = dict(dialect='std')
std = dict(conv_cfg=conv_cfg)
model = dict(
    backbone=dict(std, init_cfg=dict(checkpoint='open-mmlab://jhu/resnet50_gn_ws')),
    neck=std,
    roi_head=dict(bbox_head=std, mask_head=std),
)
