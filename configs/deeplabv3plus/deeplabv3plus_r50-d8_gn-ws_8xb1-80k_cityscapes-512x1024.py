# Baseline: GroupNorm and Weight Standardization, from mmdet's backbone.
_base_ = './deeplabv3plus_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(
    backbone=dict(
        norm_and_conv, init_cfg=dict(checkpoint='open-mmlab://jhu/resnet50_gn_ws')
    ),
    # it has a layer of 48 channels
    decode_head=dict(norm_cfg=dict(norm_cfg, num_groups=16), conv_cfg=conv_cfg),
    auxiliary_head=norm_and_conv,
)
