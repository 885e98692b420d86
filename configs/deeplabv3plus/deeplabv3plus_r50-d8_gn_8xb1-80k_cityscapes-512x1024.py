# Baseline: GroupNorm, from the backbone of mmdet's contrib recipe.
_base_ = './deeplabv3plus_r50-d8_gn-ws_8xb1-80k_cityscapes-512x1024.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    backbone=dict(
        norm_and_conv, init_cfg=dict(checkpoint='open-mmlab://contrib/resnet50_gn')
    ),
    decode_head=norm_and_conv,
    auxiliary_head=norm_and_conv,
)
