# Baseline: GroupNorm and Weight Standardization, from mmdet's backbone.
_base_ = './faster-rcnn_r50_fpn_bcn-ws-all_2x_coco.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(
    backbone=dict(
        norm_and_conv,
        frozen_stages=1,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet50_gn_ws'),
    ),
    neck=norm_and_conv,
    roi_head=dict(bbox_head=norm_and_conv),
)
