"""What norms are like that take the place of others, and which ones stay."""

import pytest
import torch
from support.stock_configs import RETINA, STOCK, model_of

from bcn_mm import BCN
from bcn_mm.convert import leftovers, read_config, to_bcn, walk
from bcn_mm.layers import is_replaceable

EPS = {
    RETINA,
    STOCK['by default, in the backbone'],
    STOCK['without asking, a neck'],
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py',
    'mmseg::mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py',
}


@pytest.mark.parametrize('source', sorted(EPS))
def test_eps_is_that_of_the_stock_model(source):
    stock = model_of(read_config(source), None)
    model = model_of(to_bcn(read_config(source)), None)
    want = [m.eps for m in stock.modules() if is_replaceable(type(m))]
    found = [m.eps for m in model.modules() if isinstance(m, BCN)]
    assert found == want
    cfg = to_bcn(read_config(source), dict(type='BCN', eps=2e-5))
    again = model_of(cfg, None)
    assert {m.eps for m in again.modules() if isinstance(m, BCN)} == {2e-5}


@pytest.mark.parametrize('eps', [1e-3, 1e-5, 2e-4])
@pytest.mark.parametrize(
    'norm', [dict(type='BN'), dict(type='SyncBN'), dict(type='GN', num_groups=16)]
)
def test_eps_and_affine_that_a_config_gives(norm, eps):
    def convert(**more):
        cfg = read_config(RETINA)
        cfg.model.backbone.norm_cfg = dict(norm, **more)
        changes = []
        cfg = to_bcn(cfg, changes=changes)
        path = 'model.backbone.norm_cfg'
        (change,) = (c for c in changes if c.path == path)
        assert change.after == cfg.model.backbone.norm_cfg
        return change

    change = convert(eps=eps, requires_grad=False)
    assert change.after.eps == eps and 'eps' in change.note
    assert 'requires_grad' not in change.after
    # as nas_fcos has it; BCN cannot
    assert 'eps' not in convert(eps=0).after
    change = convert()
    assert 'eps' not in change.after and 'eps' not in change.note
    if norm['type'] != 'GN':
        assert convert(affine=False).after.affine is False


def test_stock_weights_mean_the_same():
    """A BCN with them is the stock norm and a group norm."""
    cfg = read_config('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')
    stock, model = (model_of(c, 'cpu').eval() for c in (cfg, to_bcn(cfg)))
    state = stock.state_dict()
    for name, value in state.items():
        if name.endswith('running_var'):
            value.uniform_(1e-4, 1e-2)  # where eps matters
    model.load_state_dict(state)
    x = torch.randn(1, 24, 6, 6)
    pair = [m.backbone.stem.conv.bn for m in (stock, model)]
    groups = pair[1].num_groups
    want = torch.nn.functional.group_norm(
        pair[0](x),
        groups,
        pair[1].weight.repeat_interleave(24 // groups),
        pair[1].bias.repeat_interleave(24 // groups),
        pair[0].eps,
    )
    torch.testing.assert_close(pair[1](x), want)


def test_mmcvs_synchronized_norm_is_converted():
    cfg = read_config(
        'mmdet::strong_baselines/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_'
        'syncbn-all_lsj-100e_coco.py'
    )
    kinds = [node.get('type') for _, node in walk(to_bcn(cfg).model)]
    assert 'MMSyncBN' in {node.get('type') for _, node in walk(cfg.model)}
    assert 'MMSyncBN' not in kinds and kinds.count('BCN') == 4


class NormAct(torch.nn.BatchNorm2d):
    """Does more than normalize."""

    def forward(self, x):
        return super().forward(x).relu()


class Mixed(torch.nn.Module):
    """A backbone that builds its norms without asking."""

    def __init__(self, norm_cfg=None):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            NormAct(8),
            torch.nn.BatchNorm2d(8),
            NormAct(8),
        )

    def forward(self, x):
        return (self.stem(x),)


@pytest.mark.parametrize('norm_cfg', [None, dict(type=NormAct)])
def test_norms_that_do_more_stay_and_are_said(norm_cfg):
    cfg = read_config(RETINA)
    cfg.model.backbone = dict(type=Mixed, norm_cfg=norm_cfg)
    cfg.model.neck = None
    changes = []
    new = to_bcn(cfg, changes=changes)
    kept = {c.path: c for c in changes if c.before == c.after}
    assert kept['model.backbone'].before == '2 x NormAct'
    assert 'more than normalize' in kept['model.backbone'].note
    if norm_cfg:
        assert new.model.backbone.norm_cfg == norm_cfg
        note = kept['model.backbone.norm_cfg'].note
        assert 'NormAct' in note and 'more than normalize' in note
    model = model_of(new, 'cpu')
    kinds = [type(m).__name__ for m in model.backbone.stem]
    assert kinds == ['Conv2d', 'NormAct', 'BCN', 'NormAct']
    assert not leftovers(model)
    assert to_bcn(new).to_dict() == new.to_dict()
