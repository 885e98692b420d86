"""Patches: above all BatchNorm fused into standardized convolutions."""

import copy
import os
import pickle
import random
import sys

import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmdet.models import ResNet
from mmengine.runner import load_checkpoint
from support.checkpoints import Evil, save
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization
from torch.nn.utils import fuse_conv_bn_eval, fusion

from bcn_mm import BCN, WSConv1d, WSConv2d, WSConv3d
from bcn_mm._compat import extend_fusion, refuse_code
from bcn_mm.ops import DIALECTS

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
STANDARDIZED = {1: WSConv1d, 2: WSConv2d, 3: WSConv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def random_pair(choose, dims, kinds=STANDARDIZED):
    """A convolution with options, and a BatchNorm that has learnt."""
    groups = choose.choice([1, 2])
    options = dict(
        groups=groups,
        stride=choose.choice([1, 2]),
        padding=choose.choice([0, 1]),
        dilation=choose.choice([1, 2]),
        bias=choose.random() < 0.5,
        padding_mode=choose.choice(['zeros', 'circular']),
    )
    if kinds is STANDARDIZED:
        options['dialect'] = choose.choice(sorted(DIALECTS))
    torch.manual_seed(choose.randrange(10**6))
    conv = kinds[dims](4, 6, choose.choice([2, 3]), **options)
    norm = NORMS[dims](6, eps=choose.choice([1e-5, 1e-3]))
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 2)
    return conv.eval(), norm.eval()


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_mmcvs_fusion_computes_the_same(seed):
    choose = random.Random(seed)
    net = nn.Sequential(
        *random_pair(choose, 2),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 4, 1)),
        *random_pair(choose, 2),
    ).eval()
    x = torch.randn(2, 4, 17, 16)
    want = net(x)
    fused = fuse_conv_bn(copy.deepcopy(net))
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)
    kinds = {type(m) for m in fused.modules()}
    assert WSConv2d not in kinds and nn.BatchNorm2d not in kinds


@pytest.mark.parametrize('dims', [1, 2, 3])
@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_torchs_fusion_computes_the_same(dims, seed):
    conv, norm = random_pair(random.Random(seed), dims)
    x = torch.randn(2, 4, *[9] * dims)
    want, state = norm(conv(x)), copy.deepcopy(conv.state_dict())
    conv.weight.requires_grad_(seed % 2 == 1)
    fused = fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)
    assert type(fused) is PLAIN[dims] and not fused.training
    assert fused.weight.requires_grad == seed % 2
    for name, value in state.items():  # it is left as it was
        assert torch.equal(conv.state_dict()[name], value)


def test_a_detectors_backbone():
    net = ResNet(50, conv_cfg=dict(type='WSConv2d'), norm_eval=False).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1  # estimates that fit
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    net(x)
    net.eval()
    with torch.no_grad():
        want = net(x)
        got = fuse_conv_bn(net)(x)
    assert not any(isinstance(m, WSConv2d) for m in net.modules())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('train', [False, True])
@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_mmcvs_fusion_in_each_pass(train, seed):
    """``efficient_conv_bn_eval``, with the gradients of both layers."""
    results = []
    for efficient in (False, True):
        torch.manual_seed(seed)
        conv_cfg = dict(type='WSConv2d', dialect=sorted(DIALECTS)[seed % len(DIALECTS)])
        block = ConvModule(
            4,
            6,
            3,
            conv_cfg=conv_cfg,
            norm_cfg=dict(type='BN'),
            bias=bool(seed % 2),
            efficient_conv_bn_eval=efficient,
        )
        block(torch.randn(2, 4, 7, 7))
        block.train(train).norm.eval()
        x = torch.randn(2, 4, 7, 7, requires_grad=True)
        y = block(x)
        results.append(
            [y, *torch.autograd.grad((y * y).sum(), [x, *block.parameters()])]
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_hooks_of_the_convolution_stay():
    conv, norm = random_pair(random.Random(0), 2)
    net, seen = nn.Sequential(conv, norm).eval(), []
    handle = conv.register_forward_hook(lambda m, *_: seen.append(m))
    x = torch.randn(1, 4, 9, 9)
    fused = fuse_conv_bn(net)
    fused(x)
    assert seen == [fused[0]]
    handle.remove()
    fused(x)
    assert len(seen) == 1


# -- what does not change ----------------------------------------------------


@pytest.mark.parametrize('dims', [1, 2, 3])
@given(st.integers(0, 10**6))
def test_other_convolutions_go_the_old_way(dims, seed):
    conv, norm = random_pair(random.Random(seed), dims, PLAIN)
    new = fuse_conv_bn_eval(conv, norm)
    old = fuse_conv_bn_eval.__wrapped__(conv, norm)
    pairs = [(new, old)]
    if dims == 2:
        mmcv = sys.modules['mmcv.cnn.utils.fuse_conv_bn']._fuse_conv_bn
        a, b = copy.deepcopy(conv), copy.deepcopy(conv)
        new, old = mmcv(a, norm), mmcv.__wrapped__(b, norm)
        assert new is a  # in place
        pairs.append((new, old))
    for new, old in pairs:
        assert type(new) is type(old) is type(conv)
        for name, value in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], value)


@pytest.mark.parametrize('kind', [nn.Conv2d, WSConv2d])
def test_bcn_is_left_alone(kind):
    conv, norm = random_pair(random.Random(0), 2, {2: nn.Conv2d})
    net = nn.Sequential(
        kind(3, 8, 3),
        BCN(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        BCN(4),
        nn.Sequential(conv, norm, BCN(6)),
    )
    net(torch.randn(2, 3, 15, 15))
    net.eval()
    x = torch.randn(1, 3, 15, 15)
    want, layers = net(x), list(net)
    fused = fuse_conv_bn(net)
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)
    assert list(fused) == layers
    kinds = [type(m) for m in fused[5]]
    assert kinds == [nn.Conv2d, nn.Identity, BCN]


def test_training_mode_is_refused_as_ever():
    conv, norm = random_pair(random.Random(0), 2)
    with pytest.raises(AssertionError, match='only for eval'):
        fuse_conv_bn_eval(conv.train(), norm)


@pytest.mark.parametrize(
    'fuse',
    [
        optimization.fuse,
        quantize_fx.fuse_fx,
        lambda net: quantization.fuse_modules(net, [['0', '1']]),
        lambda net: quantization.fuse_modules(net, [['0', '1', '2']]),
    ],
    ids=['fx', 'fuse_fx', 'conv bn', 'conv bn relu'],
)
def test_other_fusions_are_right_or_refuse(fuse):
    net = nn.Sequential(*random_pair(random.Random(1), 2), nn.ReLU()).eval()
    x = torch.randn(2, 4, 9, 9)
    want = net(x)
    try:
        fused = fuse(copy.deepcopy(net))
    except Exception:
        return
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)


# -- patches -----------------------------------------------------------------


def test_mmengine_refuses_code_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save('evil.pth', dict(extra=Evil(os.system, 'touch harmed')))
    refuse_code()
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(BCN(4, 2), path)
    assert not (tmp_path / 'harmed').exists()


def test_patches_are_applied_once():
    homes = [
        (fusion, 'fuse_conv_bn_eval'),
        (nn.utils, 'fuse_conv_bn_eval'),
        (optimization, 'fuse_conv_bn_eval'),
        (sys.modules['mmcv.cnn.utils.fuse_conv_bn'], '_fuse_conv_bn'),
        (sys.modules['mmcv.cnn.bricks.conv_module'], 'efficient_conv_bn_eval_forward'),
    ]
    before = [getattr(*home) for home in homes]
    extend_fusion()
    assert [getattr(*home) for home in homes] == before
    for function in before:
        assert not hasattr(function.__wrapped__, '__wrapped__')
    again = copy.deepcopy(
        ConvModule(3, 8, 3, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True)
    )
    assert again.efficient_conv_bn_eval_forward is before[-1]


SCRIPT = """
import torch
from mmcv.cnn import fuse_conv_bn
from torch.fx.experimental import optimization
from torch.nn.utils import fuse_conv_bn_eval
from torch.nn.utils.fusion import fuse_conv_bn_eval as same
import bcn_mm
conv = bcn_mm.WSConv2d(3, 8, 3)
norm = torch.nn.BatchNorm2d(8)
norm.running_var.fill_(9)
net = torch.nn.Sequential(conv, norm).eval()
x = torch.randn(1, 3, 7, 7)
want = net(x)
for got in (
    fuse_conv_bn_eval(conv, norm)(x),
    optimization.fuse_conv_bn_eval(conv, norm)(x),
    fuse_conv_bn(net)(x),
):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
print('the same')
"""


def test_names_that_were_imported_before():
    done = run(sys.executable, '-c', SCRIPT)
    assert 'the same' in done.stdout, done.stdout
