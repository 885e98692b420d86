_base_ = './deeplabv3plus_r50-d8_bcn-ws_8xb1-80k_cityscapes-769x769.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='checkpoints/rn101_bcn_ws_mm.pth'),
    )
)
