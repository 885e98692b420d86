# Baseline: a pretrained backbone whose BatchNorm layers keep their
# statistics. The heads have nothing to keep, so they have GroupNorm.
_base_ = './deeplabv3_r50-d8_syncbn_8xb1-80k_cityscapes-512x1024.py'
norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    backbone=dict(norm_cfg=dict(type='BN'), norm_eval=True),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
