# Baseline: a pretrained backbone whose BatchNorm layers keep their
# statistics, and GroupNorm in the head, which FCOS always has.
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
model = dict(
    # the backbone of the other recipes in place of the Caffe one
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        norm_cfg=dict(requires_grad=True),
        style='pytorch',
        init_cfg=dict(checkpoint='torchvision://resnet50'),
    ),
)

# 8 GPUs x 1 image; --auto-scale-lr adapts the rate to other numbers
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=8)
