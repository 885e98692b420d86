_base_ = [
    './deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py',
    '../_base_/backbones/r101_bcn-ws.py',
]
model = dict(backbone=_base_.r101)
