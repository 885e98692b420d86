# Baseline: GroupNorm, with the pixels of the COCO recipe's backbone.
_base_ = './mask-rcnn_r50_fpn_gn-ws-all_1x_cityscapes.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    data_preprocessor=dict(
        mean=[103.530, 116.280, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
    ),
    backbone=norm_and_conv,
    neck=norm_and_conv,
    roi_head=dict(bbox_head=norm_and_conv, mask_head=norm_and_conv),
)
