# Baseline: SyncBN over all GPUs.
_base_ = './resnet50-bcn-ws_8xb1_in1k.py'
norm_cfg = dict(_delete_=True, type='SyncBN')
conv_cfg = None
model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg))
