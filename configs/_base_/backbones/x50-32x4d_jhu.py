# mmdet's own GroupNorm + WS backbone, which mmengine downloads by itself.
x50 = dict(
    type='ResNeXt',
    groups=32,
    base_width=4,
    init_cfg=dict(
        type='Pretrained', checkpoint='open-mmlab://jhu/resnext50_32x4d_gn_ws'
    ),
)
