# BatchNorm, to compare with.
_base_ = './mask-rcnn_r18_bcn-ws_shapes.py'
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg, conv_cfg=None),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=None),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg, conv_cfg=None),
        mask_head=dict(norm_cfg=norm_cfg, conv_cfg=None),
    ),
)
