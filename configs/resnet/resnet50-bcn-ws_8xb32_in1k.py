# ResNet-50 with BCN and Weight Standardization, 32 images per GPU.
_base_ = ['./resnet50-bn_8xb32_in1k.py', '../_base_/bcn-ws.py']

# with many images on every GPU, batch statistics
norm_cfg = dict(type='BCN', estimate=False)
model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=_base_.conv_cfg))
