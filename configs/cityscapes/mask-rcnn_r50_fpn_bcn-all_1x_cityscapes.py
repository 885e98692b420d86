# BCN without Weight Standardization.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1x_cityscapes.py'
conv_cfg = None
model = dict(
    backbone=dict(conv_cfg=conv_cfg),
    neck=dict(conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=dict(conv_cfg=conv_cfg),
        mask_head=dict(conv_cfg=conv_cfg),
    ),
)
