# DeepLabV3 on Pascal VOC as the paper's authors train it: 50 epochs of 16
# images over all GPUs, with the batch statistics of all of them.
_base_ = [
    'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-40k_voc12aug-512x512.py',
    '../_base_/bcn-ws.py',
    '../_base_/backbones/r101_bcn-ws.py',
]

crop_size = (513, 513)
norm_cfg = dict(type='SyncBCN', estimate=False)
norm_and_conv = dict(norm_cfg=norm_cfg, conv_cfg=_base_.conv_cfg)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        norm_and_conv,
        type='ResNet',
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        **_base_.r101,
    ),
    decode_head=dict(
        norm_and_conv,
        channels=256,
        dilations=(1, 6, 12, 18),
        dropout_ratio=0,
        align_corners=True,
    ),
    auxiliary_head=None,
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # pictures are 500 long: between half and twice their size
    dict(
        type='RandomResize',
        scale=(500, 500),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        datasets=[
            dict(part, pipeline=train_pipeline)
            for part in _base_.train_dataloader.dataset.datasets
        ]
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 33100  # 50 epochs of 10,582 pictures
optimizer = dict(lr=0.007, weight_decay=1e-4)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [
    dict(type='PolyLR', eta_min=0, power=0.9, end=max_iters, by_epoch=False)
]
train_cfg = dict(max_iters=max_iters, val_interval=3310)
default_hooks = dict(checkpoint=dict(interval=3310))
auto_scale_lr = dict(enable=False, base_batch_size=16)
