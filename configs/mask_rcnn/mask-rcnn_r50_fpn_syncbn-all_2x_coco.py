# Baseline: SyncBN over all GPUs wherever BCN is.
_base_ = './mask-rcnn_r50_fpn_bcn-all_2x_coco.py'
norm_cfg = dict(_delete_=True, type='SyncBN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
