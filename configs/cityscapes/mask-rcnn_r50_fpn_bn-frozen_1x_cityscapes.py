# Baseline: the stock recipe, from mmdet's COCO model, with frozen
# BatchNorm statistics in the backbone and no norm elsewhere.
_base_ = 'mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py'

# as the BCN recipes
auto_scale_lr = dict(base_batch_size=8)
