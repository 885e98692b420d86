# A DeepLabV3 small enough for two CPU cores, trained from scratch at one image
# per step; tools/quickstart.sh --task seg makes its data.
_base_ = [
    'mmseg::_base_/models/deeplabv3_r50-d8.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/bcn.py',
]

norm_cfg = dict(_delete_=True, type='BCN')
conv_cfg = dict(type='WSConv2d')
# nine pixels in ten are background
loss_decode = dict(class_weight=[0.2, 1.0, 1.0, 1.0])
model = dict(
    pretrained=None,
    data_preprocessor=dict(size_divisor=32),
    backbone=dict(depth=18, base_channels=32, norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    decode_head=dict(
        in_channels=256,
        channels=64,
        dilations=(1, 3, 6, 9),
        num_classes=4,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        loss_decode=loss_decode,
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=64,
        num_classes=4,
        norm_cfg=norm_cfg,
        conv_cfg=conv_cfg,
        loss_decode=loss_decode,
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
dataset = dict(
    type='BaseSegDataset',
    data_root='{{$SHAPES_ROOT:data/shapes}}/',
    metainfo=dict(
        classes=('background', 'circle', 'square', 'triangle'),
        palette=[[60, 60, 60], [220, 20, 60], [0, 130, 200], [60, 180, 75]],
    ),
)
train_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='train', seg_map_path='labels/train'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='val', seg_map_path='labels/val'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

train_cfg = dict(type='IterBasedTrainLoop', max_iters=2400, val_interval=2400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, end=2400, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2400),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
