# FCOS with BCN and Weight Standardization in the backbone, the neck and the
# head, one image per GPU.
_base_ = ['./fcos_r50_fpn_bn-frozen_1x_coco.py', '../_base_/detector.py']
model = dict(
    backbone=_base_.bcn_ws_backbone,
    neck=_base_.norm_and_conv,
    # five pyramid levels share the head's norms; each has its own estimates
    bbox_head=dict(
        norm_cfg=dict(_base_.norm_cfg, num_levels=5), conv_cfg=_base_.conv_cfg
    ),
)
