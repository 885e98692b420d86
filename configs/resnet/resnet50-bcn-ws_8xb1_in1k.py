# One image per GPU: running estimates take the batch statistics' place.
_base_ = './resnet50-bcn-ws_8xb32_in1k.py'
model = dict(backbone=dict(norm_cfg=dict(estimate=True)))

# 8 GPUs x 1 image; --auto-scale-lr adapts the rate to other numbers
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.003125))
auto_scale_lr = dict(base_batch_size=8)
