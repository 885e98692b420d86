# Baseline: the stock recipe with the authors' schedule.
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
train_cfg = dict(max_epochs=90)
param_scheduler = dict(milestones=[30, 60])
