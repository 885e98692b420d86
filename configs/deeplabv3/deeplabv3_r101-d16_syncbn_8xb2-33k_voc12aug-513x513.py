# Baseline: BatchNorm over all GPUs, from torchvision's backbone.
_base_ = './deeplabv3_r101-d16_bcn-ws_8xb2-33k_voc12aug-513x513.py'
norm_cfg = dict(_delete_=True, type='SyncBN')
conv_cfg = None
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(
    backbone=dict(norm_and_conv, init_cfg=dict(checkpoint='torchvision://resnet101')),
    decode_head=norm_and_conv,
)
