"""BCN is a norm layer to every tool of OpenMMLab that asks."""

import pytest
import torch
from mmcv.cnn import build_norm_layer, is_norm
from mmdet.registry import MODELS as MMDET
from mmengine.model import constant_init, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import get_state_dict
from mmseg.registry import MODELS as MMSEG
from support.layers import BATCH_STAGES, estimates, resnet, same
from torch import nn

from bcn_mm import BCN, WSConv2d


@pytest.mark.parametrize('scope', [MODELS, MMDET, MMSEG])
def test_registered_for_every_scope(scope):
    with scope.switch_scope_and_registry(None):
        name, layer = build_norm_layer(dict(type='BCN', requires_grad=False), 64, 1)
    assert name == 'bn1' and type(layer) is BCN and is_norm(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    assert scope.build(dict(type='BCN', num_features=8)).num_groups == 4


def test_no_batch_norm_to_norm_eval_and_to_sync_bn():
    """A stock config has norm_eval=True; estimates must move all the same."""
    net = resnet(frozen_stages=1)
    before = {n: estimates(m) for n, m in net.named_modules() if isinstance(m, BCN)}
    net.train()
    assert net.norm_eval
    net(torch.randn(1, 3, 64, 64))
    for name, module in net.named_modules():
        if isinstance(module, BCN):
            frozen = name == 'bn1' or name.startswith('layer1')
            assert same(before[name], estimates(module)) == frozen, name
    assert revert_sync_batchnorm(net) is net


@BATCH_STAGES
def test_with_cp_of_a_backbone(estimate):
    """mmdet's own ``with_cp=True``."""
    states = []
    for with_cp in (False, True):
        torch.manual_seed(1)
        norm_cfg = dict(type='BCN', estimate=estimate)
        net = resnet(norm_cfg=norm_cfg, with_cp=with_cp, norm_eval=False)
        net.double().train()
        x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
        sum(y.square().sum() for y in net(x)).backward()
        states.append(
            (
                estimates(net),
                {n: p.grad for n, p in net.named_parameters() if p.grad is not None},
            )
        )
    torch.testing.assert_close(*states)


def test_weight_decay_multiplier_reaches_all_four():
    net = nn.Sequential(WSConv2d(3, 8, 3, bias=False), BCN(8))
    wrapper = build_optim_wrapper(
        net,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5),
            paramwise_cfg=dict(norm_decay_mult=0.0),
        ),
    )
    decay = {
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    assert decay[id(net[0].weight)] == 0.5
    assert [decay[id(p)] for p in net[1].parameters()] == [0.0] * 4


def test_init_cfg_by_layer_type_and_zero_init_residual():
    net = resnet(
        depth=50,
        zero_init_residual=True,
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=0.5, bias=0.25, layer='GroupNorm'),
        ],
    )
    net.init_weights()
    assert (net.bn1.weight == 0.5).all() and (net.bn1.bias == 0.25).all()
    net = resnet(depth=50, zero_init_residual=True)
    net.init_weights()
    assert (net.layer1[0].norm3.weight == 0).all()
    assert (net.layer1[0].norm3.batch_weight == 1).all()
    # so a residual branch starts at zero and its scale learns
    block = net.layer2[1].train()
    x = torch.rand(1, 64, 8, 8)
    y = block(x)
    torch.testing.assert_close(y, x)
    y.square().sum().backward()
    grad = block.norm3.weight.grad
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


def test_constant_init_leaves_the_batch_stage():
    layer = BCN(8)
    constant_init(layer, 0, bias=0)
    assert (layer.weight == 0).all() and (layer.batch_weight == 1).all()


def test_pretrained_init_cfg(tmp_path):
    """``init_cfg=dict(type='Pretrained')`` from a BatchNorm file."""
    bn = resnet(norm_cfg=dict(type='BN'))
    path = tmp_path / 'bn.pth'
    torch.save(get_state_dict(bn), path)
    net = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    assert torch.equal(net.conv1.weight, bn.conv1.weight)
    load_checkpoint(net, str(path), strict=True)
