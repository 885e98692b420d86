# Baseline: the stock recipe, SyncBN over all GPUs. One GPU needs two
# images, since BatchNorm refuses a single value per channel.
_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py'

# as the BCN recipes
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(enable=False, base_batch_size=8)
