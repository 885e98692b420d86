# What segmenters with BCN and Weight Standardization have in common; `norm_cfg`
# is a key of mmsegmentation's own bases already.
_base_ = ['./bcn-ws.py', './backbones/r50_bcn-ws.py']
# for a head
norm_and_conv = dict(norm_cfg=dict(type='BCN'), conv_cfg=_base_.conv_cfg)
# one 7x7 convolution at the start, as in the checkpoint
bcn_ws_backbone = dict(norm_and_conv, type='ResNet', **_base_.r50)
