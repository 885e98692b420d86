# Mask R-CNN with BCN and Weight Standardization in the backbone, the neck and
# both heads, one image per GPU.
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py',
    '../_base_/detector.py',
]
norm_and_conv = _base_.norm_and_conv
model = dict(
    backbone=_base_.bcn_ws_backbone,
    neck=norm_and_conv,
    roi_head=dict(
        bbox_head=dict(
            norm_and_conv, type='Shared4Conv1FCBBoxHead', conv_out_channels=256
        ),
        mask_head=norm_and_conv,
    ),
)

# 8 GPUs x 1 image; --auto-scale-lr adapts the rate to other numbers
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
