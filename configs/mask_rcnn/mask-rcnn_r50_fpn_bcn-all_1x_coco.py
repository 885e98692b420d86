_base_ = './mask-rcnn_r50_fpn_bcn-all_2x_coco.py'
train_cfg = dict(max_epochs=12)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=12, milestones=[8, 11])
