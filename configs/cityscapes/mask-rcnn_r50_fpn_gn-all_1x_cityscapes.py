# Baseline: GroupNorm, with the pixels of the COCO recipe's backbone.
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_1x_cityscapes.py'
conv_cfg = None
model = dict(
    data_preprocessor=dict(
        mean=[103.530, 116.280, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
    ),
    backbone=dict(conv_cfg=conv_cfg),
    neck=dict(conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=dict(conv_cfg=conv_cfg),
        mask_head=dict(conv_cfg=conv_cfg),
    ),
)
