# BCN without Weight Standardization: plain convolutions start from the stock
# BatchNorm backbone, whose norms load into BCN's batch stage.
_base_ = './deeplabv3plus_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py'
conv_cfg = None
model = dict(
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(type='ResNetV1c', conv_cfg=conv_cfg, init_cfg=None),
    decode_head=dict(conv_cfg=conv_cfg),
    auxiliary_head=dict(conv_cfg=conv_cfg),
)
