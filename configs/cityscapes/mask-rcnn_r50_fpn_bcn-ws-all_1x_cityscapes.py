# Mask R-CNN on Cityscapes with BCN and Weight Standardization in the backbone,
# the neck and both heads, one image per GPU.
_base_ = [
    'mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py',
    '../_base_/detector.py',
]
norm_and_conv = _base_.norm_and_conv
model = dict(
    # the COCO model has the backbone
    backbone=dict(_base_.bcn_ws_backbone, init_cfg=None),
    neck=norm_and_conv,
    roi_head=dict(
        bbox_head=dict(
            norm_and_conv, type='Shared4Conv1FCBBoxHead', conv_out_channels=256
        ),
        mask_head=norm_and_conv,
    ),
)
# the stock one has other norms; name a COCO model of the same recipe instead
load_from = None

# the stock batch size and rate are for 8 GPUs x 1 image already
auto_scale_lr = dict(base_batch_size=8)
