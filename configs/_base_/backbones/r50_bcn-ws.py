# The authors' ImageNet model; mask_rcnn/README.md says how to get it.
r50 = dict(
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/rn50_bcn_ws_mm.pth')
)
