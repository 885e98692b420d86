# BCN without Weight Standardization: plain convolutions start from the stock
# BatchNorm backbone, whose norms load into BCN's batch stage.
_base_ = './deeplabv3plus_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(norm_and_conv, type='ResNetV1c', init_cfg=None),
    decode_head=norm_and_conv,
    auxiliary_head=norm_and_conv,
)
