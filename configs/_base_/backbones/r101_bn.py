# The stock BatchNorm backbone, whose norms load into BCN's batch stage.
r101 = dict(
    depth=101,
    init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101'),
)
