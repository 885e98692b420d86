# DeepLabV3+ with BCN and Weight Standardization throughout, one image per GPU.
_base_ = [
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-769x769.py',
    '../_base_/segmenter.py',
]
norm_and_conv = _base_.norm_and_conv
norm_cfg = norm_and_conv.norm_cfg
model = dict(
    pretrained=None,
    backbone=_base_.bcn_ws_backbone,
    decode_head=norm_and_conv,
    auxiliary_head=norm_and_conv,
)

# 8 GPUs x 1 image: the stock rate; --auto-scale-lr adapts it to other numbers
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(enable=False, base_batch_size=8)
