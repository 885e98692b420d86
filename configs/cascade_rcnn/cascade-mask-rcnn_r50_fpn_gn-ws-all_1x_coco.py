# Baseline: GroupNorm and Weight Standardization, from mmdet's backbone.
_base_ = './cascade-mask-rcnn_r50_fpn_bcn-ws-all_1x_coco.py'
norm_cfg = dict(type='GN', num_groups=32)
conv_cfg = dict(type='ConvWS')
# in place of a dict; lists are replaced as they are
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=dict(conv_cfg, _delete_=True))
model = dict(
    backbone=dict(
        norm_and_conv,
        frozen_stages=1,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet50_gn_ws'),
    ),
    neck=norm_and_conv,
    roi_head=dict(
        bbox_head=[
            dict(head, norm_cfg=norm_cfg, conv_cfg=conv_cfg)
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=norm_and_conv,
    ),
)
