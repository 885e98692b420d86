# Baseline: the stock recipe, which keeps the statistics of its
# pretrained BatchNorm layers and has no norm elsewhere.
_base_ = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'

# as the BCN recipes
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
