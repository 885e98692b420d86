# Baseline: GroupNorm and Weight Standardization, from mmdet's backbone.
_base_ = './faster-rcnn_r50_fpn_bcn-ws-all_2x_coco.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
model = dict(
    backbone=dict(
        frozen_stages=1,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='open-mmlab://jhu/resnet50_gn_ws',
        ),
    ),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)),
)
