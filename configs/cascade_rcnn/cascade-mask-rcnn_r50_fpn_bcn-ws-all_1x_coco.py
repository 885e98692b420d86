# Cascade Mask R-CNN with BCN and Weight Standardization in the backbone, the
# neck and all heads, one image per GPU.
_base_ = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['bcn_mm'])
custom_hooks = [dict(type='SyncEstimatesHook')]

norm_cfg = dict(type='BCN')
# the dialect of the checkpoint
conv_cfg = dict(type='WSConv2d', dialect='var')
model = dict(
    backbone=dict(
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,
        frozen_stages=-1,
        # the authors'; mask_rcnn/README.md says how to get it
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rn50_bcn_ws_mm.pth'),
    ),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=[
            dict(
                head,
                type='Shared4Conv1FCBBoxHead',
                conv_out_channels=256,
                norm_cfg=norm_cfg,
                conv_cfg=conv_cfg,
            )
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    ),
)

# 8 GPUs x 1 image; --auto-scale-lr adapts the rate to other numbers
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
