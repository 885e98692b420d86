# mmdet's own GroupNorm + WS backbone, which mmengine downloads by itself.
r101 = dict(
    depth=101,
    init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://jhu/resnet101_gn_ws'),
)
