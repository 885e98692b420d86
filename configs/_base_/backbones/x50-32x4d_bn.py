# The stock BatchNorm backbone, whose norms load into BCN's batch stage.
x50 = dict(
    type='ResNeXt',
    groups=32,
    base_width=4,
    init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnext50_32x4d'),
)
