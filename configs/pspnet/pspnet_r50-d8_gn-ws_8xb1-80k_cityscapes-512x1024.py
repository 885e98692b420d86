# Baseline: GroupNorm and Weight Standardization, from mmdet's backbone.
_base_ = './pspnet_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(
    backbone=dict(
        norm_and_conv, init_cfg=dict(checkpoint='open-mmlab://jhu/resnet50_gn_ws')
    ),
    decode_head=norm_and_conv,
    auxiliary_head=norm_and_conv,
)
