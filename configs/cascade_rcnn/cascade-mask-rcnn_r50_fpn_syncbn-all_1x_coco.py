# Baseline: SyncBN over all GPUs wherever BCN is.
_base_ = './cascade-mask-rcnn_r50_fpn_bcn-all_1x_coco.py'
norm_cfg = dict(type='SyncBN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=[
            dict(head, norm_cfg=norm_cfg) for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
