# PSPNet with BCN and Weight Standardization throughout, one image per GPU.
_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['bcn_mm'])
custom_hooks = [dict(type='SyncEstimatesHook')]

norm_cfg = dict(type='BCN')
# the dialect of the checkpoint
conv_cfg = dict(type='WSConv2d', dialect='var')
model = dict(
    pretrained=None,
    backbone=dict(
        # one 7x7 convolution at the start, as in the checkpoint
        type='ResNet',
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        # the authors'; mask_rcnn/README.md says how to get it
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rn50_bcn_ws_mm.pth'),
    ),
    decode_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
)

# 8 GPUs x 1 image: the stock rate; --auto-scale-lr adapts it to other numbers
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(enable=False, base_batch_size=8)
