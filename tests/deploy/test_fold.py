"""A folded model equals the model."""

import copy
import re

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from support.deployment import FOLDS, NETS, STAYS, randomize, seq
from torch import nn

from bcn_mm import BCN, WSConv2d
from bcn_mm.deploy import (
    UNUSED,
    AffineGroupNorm,
    export_onnx,
    fold,
    largest_difference,
)


@pytest.mark.filterwarnings('ignore:num_groups=8')
@pytest.mark.parametrize('name', NETS)
def test_folding_is_exact(name):
    net, shape = NETS[name]()
    randomize(net).double()
    before = copy.deepcopy(net.state_dict())
    report = []
    folded = fold(net, torch.randn(shape).double(), report=report)
    assert not [m for m in folded.modules() if isinstance(m, BCN)]
    assert not [m for m in folded.modules() if hasattr(m, 'dialect')]
    assert not [m for m in folded.modules() if m.training]
    notes = [f.note for f in report if f.norm and not f.conv]
    if name in FOLDS:
        assert not notes
    else:
        reason = STAYS[name][1]
        assert notes and all(re.search(reason, note) for note in notes)
    with torch.no_grad():
        for x in (torch.randn(shape), torch.randn(1, *shape[1:])):
            expected = net(x.double())
            assert largest_difference(folded(x.double()), expected) < 1e-10
            single, x = copy.deepcopy(folded).float(), x.float()
            assert largest_difference(single(x), expected) < 1e-5
    # the model itself is as it was
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert any(isinstance(m, BCN) for m in net.modules())


def test_only_the_layers_that_a_pass_uses_are_folded():
    net, shape = seq(WSConv2d(4, 8, 3), BCN(8))
    net.spare = nn.Sequential(WSConv2d(4, 8, 3), BCN(8))
    net.call = lambda net, x: net.norm(net.conv(x))
    randomize(net)
    report = []
    folded = fold(net, torch.randn(shape), report=report)
    notes = {f.norm: f.note for f in report if f.norm}
    assert notes == {'norm': '', 'spare.1': UNUSED}
    assert type(folded.norm) is nn.GroupNorm
    assert type(folded.conv) is type(folded.spare[0]) is nn.Conv2d
    assert type(folded.spare[1]) is AffineGroupNorm
    x = torch.randn(shape)
    with torch.no_grad():
        assert largest_difference(folded.spare(x), net.spare(x)) < 1e-5


@pytest.mark.parametrize('pre', [True, False])
def test_hooks_of_a_norm_see_what_they_saw(pre):
    net, shape = seq(WSConv2d(4, 8, 3), BCN(8))
    randomize(net)
    seen, x = [], torch.randn(shape)

    def hook(module, inputs, output=None):
        seen.append((inputs[0], output))
        return None if pre else output * 2

    norm = net.norm
    (norm.register_forward_pre_hook if pre else norm.register_forward_hook)(hook)
    report = []
    folded = fold(net, x, report=report)
    assert [f.note for f in report if f.norm] == ['it has hooks']
    seen.clear()
    with torch.no_grad():
        assert largest_difference(folded(x), net(x)) < 1e-5
    (got, made), (want, expected) = seen
    assert largest_difference(got, want) < 1e-5
    assert pre or largest_difference(made, expected) < 1e-5


def test_a_model_that_is_a_norm():
    norm = randomize(BCN(8))
    x = torch.randn(2, 8, 5, 5)
    folded = fold(norm, x)
    assert type(folded) is AffineGroupNorm
    assert largest_difference(folded(x), norm(x)) < 1e-5


def test_training_mode_is_refused():
    net, shape = seq(WSConv2d(4, 8, 3), BCN(8))
    net.eval().norm.train()
    with pytest.raises(ValueError, match='norm is in training mode'):
        fold(net, torch.randn(shape))
    with pytest.raises(ValueError, match='in evaluation mode'):
        export_onnx(net, 'none.onnx', torch.randn(shape))
    with pytest.raises(ValueError, match='unknown exporter'):
        export_onnx(net.eval(), 'none.onnx', torch.randn(shape), 'jit')


def test_a_wrong_folding_is_noticed():
    """A model that does something else in its second pass."""
    net, shape = seq(nn.Conv2d(4, 8, 3), BCN(8))
    randomize(net)

    def forward(net, x):
        net.passes = getattr(net, 'passes', 0) + 1
        y = net.conv(x)
        return net.norm(y if net.passes % 2 else y * y)

    net.call = forward
    with pytest.raises(RuntimeError, match='differs from the model'):
        fold(net, torch.randn(shape))


def test_largest_difference():
    a = [torch.tensor([1.0, -4.0]), torch.zeros(0)]
    b = [torch.tensor([1.0, -4.4]), torch.zeros(0)]
    assert largest_difference(b, a) == pytest.approx(0.1)
    assert largest_difference(a, a[:1]) == float('inf')
    assert largest_difference(a[0], a[0][:1]) == float('inf')
    assert largest_difference(a[0] / 0, a[0]) == float('inf')


@pytest.mark.slow
def test_components():
    """Heads that levels share, with and without estimates for each; norms
    put in by WithBCN."""
    x = [torch.randn(1, 32, s, s + 3).double() for s in (24, 12, 6)]
    head = dict(
        type='mmdet.FCOSHead',
        num_classes=3,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        strides=(8, 16, 32),
    )
    encoder = dict(
        type='WithBCN',
        component='mmdet.DilatedEncoder',
        in_channels=32,
        out_channels=32,
        block_mid_channels=16,
        num_residual_blocks=2,
        block_dilations=[2, 4],
    )
    cases = [
        (dict(head, norm_cfg=dict(type='BCN')), (x,), 4, 4),
        (dict(head, norm_cfg=dict(type='BCN', num_levels=3)), (x,), 0, 4),
        (encoder, ([x[0]],), 8, 8),
    ]
    for cfg, inputs, folds, norms in cases:
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = randomize(MODELS.build(cfg)).double()
        report = []
        folded = fold(model, *inputs, report=report)
        found = [f for f in report if f.norm]
        assert len(found) == norms
        assert sum(f.conv is not None for f in found) == folds
        other = ([torch.randn_like(t) for t in inputs[0]],)
        with torch.no_grad():
            assert largest_difference(folded(*other), model(*other)) < 1e-10
