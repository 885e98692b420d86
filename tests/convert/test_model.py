"""What only the built model shows: heads that pyramid levels share."""

from collections import defaultdict

import pytest
import torch
from support.stock_configs import RETINA, model_of

from bcn_mm import BCN
from bcn_mm.convert import read_config, to_bcn

LEVELS = {
    RETINA: None,  # no norm in its head
    'mmdet::atss/atss_r50_fpn_1x_coco.py': 5,
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py': 5,
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 5,
    'mmdet::vfnet/vfnet_r50_fpn_1x_coco.py': 5,
    'mmdet::solov2/solov2_r50_fpn_1x_coco.py': 5,
    # a norm, or a convolution and a norm, for each level
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': None,
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': None,
    'mmdet::nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py': None,
    # regions of all levels in one batch
    'mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py': None,
}


@pytest.mark.parametrize('source', LEVELS)
def test_levels_are_as_many_as_share_a_layer(source):
    cfg = to_bcn(read_config(source))
    model = model_of(cfg, 'cpu').eval()
    calls = defaultdict(int)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BCN)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    with torch.no_grad():
        features = model.extract_feat(torch.zeros(1, 3, 128, 160))
        for name in ('bbox_head', 'mask_head'):
            if getattr(model, name, None) is not None:
                getattr(model, name)(features)
    for name, layer in layers.items():
        assert layer.num_levels == calls.get(name, 1), name
    found = {m.num_levels for m in layers.values()} - {1}
    assert found == ({LEVELS[source]} if LEVELS[source] else set())
