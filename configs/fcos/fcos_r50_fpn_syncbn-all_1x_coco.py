# Baseline: SyncBN over all GPUs wherever BCN is.
_base_ = './fcos_r50_fpn_bcn-all_1x_coco.py'
norm_cfg = dict(_delete_=True, type='SyncBN')
norm_and_conv = dict(norm_cfg=norm_cfg)
model = dict(
    backbone=norm_and_conv,
    neck=norm_and_conv,
    bbox_head=norm_and_conv,
)
