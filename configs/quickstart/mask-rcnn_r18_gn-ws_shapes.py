# GroupNorm with Weight Standardization, to compare with; fewer groups serve it worse
# here (docs/notes/evidence.md).
_base_ = './mask-rcnn_r18_bcn-ws_shapes.py'
norm_cfg = dict(_delete_=True, type='GN', num_groups=32)
conv_cfg = dict(_delete_=True, type='ConvWS')
model = dict(
    backbone=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
        mask_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    ),
)
