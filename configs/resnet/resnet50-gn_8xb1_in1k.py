# Baseline: GroupNorm.
_base_ = './resnet50-gn-ws_8xb1_in1k.py'
conv_cfg = None
model = dict(backbone=dict(conv_cfg=conv_cfg))
