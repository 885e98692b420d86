# Baseline: GroupNorm and Weight Standardization.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1x_cityscapes.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
model = dict(
    backbone=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
        mask_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    ),
)
