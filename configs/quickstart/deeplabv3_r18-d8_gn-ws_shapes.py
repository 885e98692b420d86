# GroupNorm with Weight Standardization, to compare with.
_base_ = './deeplabv3_r18-d8_bcn-ws_shapes.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=16)
conv_cfg = dict(_delete_=True, type='ConvWS')
model = dict(
    backbone=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    decode_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
)
