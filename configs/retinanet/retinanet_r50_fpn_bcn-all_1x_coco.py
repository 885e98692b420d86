# BCN without Weight Standardization, from the stock BatchNorm backbone.
_base_ = './retinanet_r50_fpn_bcn-ws-all_1x_coco.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    backbone=dict(norm_and_conv, init_cfg=dict(checkpoint='torchvision://resnet50')),
    neck=norm_and_conv,
    bbox_head=norm_and_conv,
)
