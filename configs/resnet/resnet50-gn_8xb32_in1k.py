# Baseline: GroupNorm.
_base_ = './resnet50-gn-ws_8xb32_in1k.py'
conv_cfg = None
model = dict(backbone=dict(conv_cfg=conv_cfg))
