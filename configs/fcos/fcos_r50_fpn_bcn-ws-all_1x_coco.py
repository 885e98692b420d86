# FCOS with BCN and Weight Standardization in the backbone, the neck and the
# head, one image per GPU.
_base_ = './fcos_r50_fpn_bn-frozen_1x_coco.py'
custom_imports = dict(imports=['bcn_mm'])
custom_hooks = [dict(type='SyncEstimatesHook')]

norm_cfg = dict(type='BCN')
# the dialect of the checkpoint
conv_cfg = dict(type='WSConv2d', dialect='var')
model = dict(
    backbone=dict(
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        norm_eval=False,
        frozen_stages=-1,
        # the authors'; mask_rcnn/README.md says how to get it
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rn50_bcn_ws_mm.pth'),
    ),
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    # five pyramid levels share the head's norms; each has its own estimates
    bbox_head=dict(norm_cfg=dict(norm_cfg, num_levels=5), conv_cfg=conv_cfg),
)
