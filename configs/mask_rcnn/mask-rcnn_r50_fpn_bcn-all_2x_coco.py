# BCN without Weight Standardization: plain convolutions start from the stock
# BatchNorm backbone, whose norms load into BCN's batch stage.
_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py'
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
        bbox_head=dict(conv_cfg=conv_cfg),
        mask_head=dict(conv_cfg=conv_cfg),
    ),
)
