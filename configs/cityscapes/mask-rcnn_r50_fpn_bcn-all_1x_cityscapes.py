# BCN without Weight Standardization.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1x_cityscapes.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    backbone=norm_and_conv,
    neck=norm_and_conv,
    roi_head=dict(bbox_head=norm_and_conv, mask_head=norm_and_conv),
)
