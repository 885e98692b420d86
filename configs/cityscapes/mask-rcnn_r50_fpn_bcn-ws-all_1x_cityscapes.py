# Mask R-CNN on Cityscapes with BCN and Weight Standardization in the backbone,
# the neck and both heads, one image per GPU.
_base_ = 'mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py'
custom_imports = dict(imports=['bcn_mm'])
custom_hooks = [dict(type='SyncEstimatesHook')]

norm_cfg = dict(type='BCN')
# as the COCO model
conv_cfg = dict(type='WSConv2d', dialect='var')
model = dict(
    backbone=dict(
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,
        frozen_stages=-1,
    ),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            conv_out_channels=256,
            norm_cfg=norm_cfg,
            conv_cfg=conv_cfg,
        ),
        mask_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    ),
)
# the stock one has other norms; name a COCO model of the same recipe instead
load_from = None

# the stock batch size and rate are for 8 GPUs x 1 image already
auto_scale_lr = dict(base_batch_size=8)
