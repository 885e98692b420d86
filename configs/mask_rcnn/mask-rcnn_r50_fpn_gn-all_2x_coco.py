# Baseline: GroupNorm, from mmdet's pretrained backbone.
_base_ = 'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'

# as the BCN recipes
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
