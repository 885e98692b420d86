"""Recipes in mmengine's new style say what their old-style originals say."""

import pytest
from conftest import ROOT
from mmengine.config import Config
from support.stock_configs import model_of

from bcn_mm import BCN, get_config, to_bcn
from bcn_mm.convert import scope_of, type_name

RECIPES = {
    'mask-rcnn_r50-jhu_fpn_bcn-ws-all_2x_coco': 'mmdet',
    'deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024': 'mmseg',
}
# a class that is registered under another name than its own
REGISTERED = {'PretrainedInit': 'Pretrained'}
# what a runner is made of
PARTS = (
    'model',
    *(
        f'{s}_{part}'
        for s in ('train', 'val', 'test')
        for part in ('cfg', 'dataloader')
    ),
    'val_evaluator',
    'test_evaluator',
    'optim_wrapper',
    'param_scheduler',
    'auto_scale_lr',
    'default_hooks',
    'custom_hooks',
    'env_cfg',
    'visualizer',
    'log_processor',
    'log_level',
)


def said(value):
    """Types by their names, without what says nothing."""
    if isinstance(value, dict):
        return {
            k: REGISTERED.get(type_name(v), type_name(v)) if k == 'type' else said(v)
            for k, v in value.items()
            if k != '_scope_' and v is not None
        }
    if isinstance(value, (list, tuple)):
        return [said(v) for v in value]
    return value


def new_style(name):
    path = ROOT / 'configs/new_style' / f'{name.replace("-", "_")}.py'
    return Config.fromfile(path)


@pytest.mark.parametrize('name', RECIPES)
def test_they_say_the_same(name):
    new, old = new_style(name), get_config(name)
    assert new.default_scope is None and scope_of(new) == RECIPES[name]
    for part in PARTS:
        assert said(dict(p=new.get(part))) == said(dict(p=old.get(part))), part
    state, expected = (model_of(cfg).state_dict() for cfg in (new, old))
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in expected.items()
    }
    assert new.model.backbone.norm_cfg.type is BCN
    assert said(to_bcn(new, ws=True).model) == said(new.model)
