_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='checkpoints/rn101_bcn_ws_mm.pth'),
    )
)
