"""Configs in the new style, which the wheels of mmdet and mmseg do not ship."""

DETECTOR = """
from mmdet.models.backbones import ResNet
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.detectors import RetinaNet
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.necks import FPN
from mmdet.models.task_modules import (AnchorGenerator, DeltaXYWHBBoxCoder,
                                       MaxIoUAssigner, PseudoSampler)
from mmengine.config import read_base
from mmengine.model.weight_init import PretrainedInit
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper
from torch.nn import BatchNorm2d, GroupNorm
from torch.optim import SGD

default_scope = None
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(
        type=ResNet,
        depth=18,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type=BatchNorm2d, requires_grad=True),
        norm_eval=True,
        init_cfg=dict(type=PretrainedInit, checkpoint='torchvision://resnet18'),
    ),
    neck=dict(
        type=FPN,
        in_channels=[64, 128, 256, 512],
        out_channels=64,
        start_level=1,
        add_extra_convs='on_input',
        num_outs=5,
    ),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=3,
        in_channels=64,
        stacked_convs=1,
        feat_channels=64,
        norm_cfg=dict(type=GroupNorm, num_groups=32),
        anchor_generator=dict(
            type=AnchorGenerator,
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(
            type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
        ),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(score_thr=0.05, max_per_img=100, nms=dict(type='nms')),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01, momentum=0.9)
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.001, by_epoch=False, end=500),
    dict(type=MultiStepLR, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=16)
"""
