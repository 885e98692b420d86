# Baseline: GroupNorm and Weight Standardization.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1x_cityscapes.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(
    backbone=norm_and_conv,
    neck=norm_and_conv,
    roi_head=dict(bbox_head=norm_and_conv, mask_head=norm_and_conv),
)
