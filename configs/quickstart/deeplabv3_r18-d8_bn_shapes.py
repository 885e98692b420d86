# BatchNorm, to compare with. It refuses the one value per channel of DeepLab's
# image pooling at one image per step, so the decode head has GroupNorm.
_base_ = './deeplabv3_r18-d8_bcn-ws_shapes.py'
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    backbone=dict(norm_cfg=norm_cfg, conv_cfg=None),
    decode_head=dict(
        norm_cfg=dict(_delete_=True, type='GN', num_groups=16), conv_cfg=None
    ),
    auxiliary_head=dict(norm_cfg=norm_cfg, conv_cfg=None),
)
