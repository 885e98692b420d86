# Baseline: GroupNorm and Weight Standardization, from mmdet's backbone.
_base_ = './cascade-mask-rcnn_r50_fpn_bcn-ws-all_1x_coco.py'
norm_cfg = dict(type='GN', num_groups=32)
conv_cfg = dict(type='ConvWS')
model = dict(
    backbone=dict(
        frozen_stages=1,
        norm_cfg=norm_cfg,
        conv_cfg=dict(conv_cfg, _delete_=True),
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='open-mmlab://jhu/resnet50_gn_ws',
        ),
    ),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=dict(conv_cfg, _delete_=True)),
    roi_head=dict(
        bbox_head=[
            dict(head, norm_cfg=norm_cfg, conv_cfg=conv_cfg)
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(norm_cfg=norm_cfg, conv_cfg=dict(conv_cfg, _delete_=True)),
    ),
)
