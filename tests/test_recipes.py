"""The recipes by name."""

import pytest
from mmengine.hub import get_config as stock_get_config
from support.recipes import CONFIGS

import bcn_mm


def test_names():
    names = bcn_mm.list_models()
    assert len(names) == len(set(names)) > 50 and names == sorted(names)
    assert names == sorted(path.stem for path in CONFIGS)
    found = bcn_mm.list_models('mask-rcnn_r50*bcn-ws*coco')
    assert 'mask-rcnn_r50_fpn_bcn-ws-all_2x_coco' in found
    assert all('mask-rcnn_r50' in name for name in found)


def test_config_is_the_one_mmengine_finds():
    name = 'retinanet_r50_fpn_bcn-ws-all_1x_coco'
    own = bcn_mm.get_config(name)
    assert own.model == stock_get_config(f'bcn_mm::retinanet/{name}.py').model


def test_model():
    model = bcn_mm.get_model(
        'deeplabv3_r18-d8_bcn-ws_shapes', {'model.backbone.base_channels': 16}
    )
    assert type(model).__name__ == 'EncoderDecoder'
    assert model.backbone.layer1[0].conv1.out_channels == 16
    assert isinstance(model.backbone.layer1[0].bn1, bcn_mm.BCN)


def test_unknown_name():
    with pytest.raises(ValueError, match='did you mean retinanet_r50_fpn_bcn'):
        bcn_mm.get_config('retinanet_r50_bcn')
