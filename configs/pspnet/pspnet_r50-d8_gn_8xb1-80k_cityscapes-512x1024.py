# Baseline: GroupNorm, from scratch as BCN + WS.
_base_ = './pspnet_r50-d8_gn-ws_8xb1-80k_cityscapes-512x1024.py'
conv_cfg = None
model = dict(
    backbone=dict(conv_cfg=conv_cfg),
    decode_head=dict(conv_cfg=conv_cfg),
    auxiliary_head=dict(conv_cfg=conv_cfg),
)
