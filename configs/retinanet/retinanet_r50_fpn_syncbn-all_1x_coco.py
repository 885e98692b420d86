# Baseline: SyncBN over all GPUs wherever BCN is.
_base_ = './retinanet_r50_fpn_bcn-all_1x_coco.py'
norm_cfg = dict(_delete_=True, type='SyncBN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
)
