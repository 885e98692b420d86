# Baseline: GroupNorm and Weight Standardization.
_base_ = './resnet50-bcn-ws_8xb32_in1k.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg))
