# Baseline: GroupNorm, from the pretrained backbone of mmdet's gn/ and
# with the pixels that it was trained on.
_base_ = './retinanet_r50_fpn_gn-ws-all_1x_coco.py'
conv_cfg = None
norm_and_conv = dict(conv_cfg=conv_cfg)
model = dict(
    data_preprocessor=dict(
        mean=[103.530, 116.280, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
    ),
    backbone=dict(
        norm_and_conv,
        init_cfg=dict(checkpoint='open-mmlab://detectron/resnet50_gn'),
    ),
    neck=norm_and_conv,
    bbox_head=norm_and_conv,
)
