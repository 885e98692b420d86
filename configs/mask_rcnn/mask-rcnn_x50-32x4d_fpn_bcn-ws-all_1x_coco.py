_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1x_coco.py'
model = dict(
    backbone=dict(
        type='ResNeXt',
        groups=32,
        base_width=4,
        init_cfg=dict(checkpoint='checkpoints/rx50_bcn_ws_mm.pth'),
    )
)
