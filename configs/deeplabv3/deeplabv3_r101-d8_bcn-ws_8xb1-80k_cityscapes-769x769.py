_base_ = [
    './deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-769x769.py',
    '../_base_/backbones/r101_bcn-ws.py',
]
model = dict(backbone=_base_.r101)
