# BCN without Weight Standardization: plain convolutions start from the stock
# BatchNorm backbone, whose norms load into BCN's batch stage.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    backbone=dict(norm_and_conv, init_cfg=dict(checkpoint='torchvision://resnet50')),
    neck=norm_and_conv,
    roi_head=dict(bbox_head=norm_and_conv, mask_head=norm_and_conv),
)
