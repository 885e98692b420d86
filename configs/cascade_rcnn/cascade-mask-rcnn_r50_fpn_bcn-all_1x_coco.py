# BCN without Weight Standardization, from the stock BatchNorm backbone.
_base_ = './cascade-mask-rcnn_r50_fpn_bcn-ws-all_1x_coco.py'
conv_cfg = None
model = dict(
    backbone=dict(
        conv_cfg=conv_cfg,
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='torchvision://resnet50',
        ),
    ),
    neck=dict(conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=[
            dict(head, conv_cfg=conv_cfg) for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(conv_cfg=conv_cfg),
    ),
)
