# ResNet-50 with BCN and Weight Standardization, 32 images per GPU.
_base_ = './resnet50-bn_8xb32_in1k.py'
custom_imports = dict(imports=['bcn_mm'])
custom_hooks = [dict(type='SyncEstimatesHook')]

# with many images on every GPU, batch statistics
norm_cfg = dict(type='BCN', estimate=False)
conv_cfg = dict(type='WSConv2d', dialect='var')
model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg))
