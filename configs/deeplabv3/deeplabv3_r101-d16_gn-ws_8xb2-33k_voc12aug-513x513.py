# Baseline: GroupNorm and Weight Standardization, from the authors' backbone.
_base_ = './deeplabv3_r101-d16_bcn-ws_8xb2-33k_voc12aug-513x513.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(
    backbone=dict(
        norm_and_conv, init_cfg=dict(checkpoint='open-mmlab://jhu/resnet101_gn_ws')
    ),
    decode_head=norm_and_conv,
)
