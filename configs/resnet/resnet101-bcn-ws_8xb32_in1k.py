# ResNet-101 with BCN and Weight Standardization, 32 images per GPU; the stock
# schedule is the authors'.
_base_ = ['mmpretrain::resnet/resnet101_8xb32_in1k.py', '../_base_/bcn-ws.py']

# with many images on every GPU, batch statistics
norm_cfg = dict(type='BCN', estimate=False)
model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=_base_.conv_cfg))
