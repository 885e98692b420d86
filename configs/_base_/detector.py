# What detectors with BCN and Weight Standardization have in common. They say
# where each of these goes: no two bases may have a key such as `model`.
_base_ = ['./bcn-ws.py', './backbones/r50_bcn-ws.py']
norm_cfg = dict(type='BCN')
# for a neck or a head
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=_base_.conv_cfg)
# all stages train, and so do the estimates
bcn_ws_backbone = dict(norm_and_conv, norm_eval=False, frozen_stages=-1, **_base_.r50)
