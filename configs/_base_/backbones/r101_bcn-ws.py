# The authors' ImageNet model; mask_rcnn/README.md says how to get it.
r101 = dict(
    depth=101,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rn101_bcn_ws_mm.pth'),
)
