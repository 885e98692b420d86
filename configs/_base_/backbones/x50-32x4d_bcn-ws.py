# The authors' ImageNet model; mask_rcnn/README.md says how to get it.
x50 = dict(
    type='ResNeXt',
    groups=32,
    base_width=4,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rx50_bcn_ws_mm.pth'),
)
