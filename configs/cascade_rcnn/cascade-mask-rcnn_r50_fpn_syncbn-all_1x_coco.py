# Baseline: SyncBN over all GPUs wherever BCN is.
_base_ = './cascade-mask-rcnn_r50_fpn_bcn-all_1x_coco.py'
norm_cfg = dict(type='SyncBN')
norm_and_conv = dict(norm_cfg=norm_cfg)
model = dict(
    backbone=norm_and_conv,
    neck=norm_and_conv,
    roi_head=dict(
        bbox_head=[
            dict(head, **norm_and_conv) for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=norm_and_conv,
    ),
)
