"""A norm that trains without its parameters is never meant: one line says so."""

import copy
import pickle

import pytest
import torch
from conftest import needs_torch
from mmdet.registry import MODELS as MMDET
from mmengine.config import Config
from support.layers import resnet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN
from bcn_mm.convert import read_config

CAFFE = 'mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py'
X = torch.randn(1, 3, 64, 64)


def said(log):
    return [line for line in log if 'do not train' in line]


def caffe(**norm_cfg):
    """The backbone of a stock config in which a hand has written BCN."""
    cfg = read_config(CAFFE)
    edit = dict(norm_cfg=dict(type='BCN', **norm_cfg), norm_eval=False)
    cfg.merge_from_dict(dict(model=dict(backbone=edit)))
    cfg.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    return MMDET.build(cfg.model.backbone)


def step(net):
    """What a training does with a model in an epoch of one step."""
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    sum(y.sum() for y in net(X)).backward()
    optimizer.step()


def test_caffe_config(log):
    net = caffe()
    assert not any(
        p.requires_grad
        for m in net.modules()
        if isinstance(m, BCN)
        for p in m.parameters()
    )
    assert not said(log)
    step(net)
    (line,) = said(log)
    assert 'requires_grad=True' in line and '_delete_=True' in line
    for _ in range(2):
        step(net)
    assert len(said(log)) == 1
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize('edit', [dict(requires_grad=True), dict(_delete_=True)])
def test_the_cure(edit, log):
    net = caffe(**edit)
    step(net)
    assert not said(log)
    assert any(p.requires_grad for p in net.layer4[1].bn2.parameters())


def test_cure_in_a_file(tmp_path, log):
    """``_delete_`` as a config file has it."""
    path = tmp_path / 'edited.py'
    norm_cfg = "norm_cfg=dict(_delete_=True, type='BCN')"
    path.write_text(f"_base_ = '{CAFFE}'\nmodel = dict(backbone=dict({norm_cfg}))\n")
    backbone = Config.fromfile(path).model.backbone
    backbone.update(depth=18, base_channels=8, init_cfg=None)
    step(MMDET.build(backbone))
    assert not said(log)


def test_stock_models_say_nothing_and_have_no_hooks(log):
    net = resnet()
    step(net)
    assert not said(log)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_frozen_stages(log):
    """They are in evaluation mode when they run, and come back as they were."""
    net = resnet(frozen_stages=2)
    for _ in range(2):
        step(net)
        assert not net.layer1[0].bn1.training
        assert not net.layer1[0].bn1.weight.requires_grad
        assert not any(m._forward_pre_hooks for m in net.modules())
    assert not said(log)


def test_a_norm_that_thaws_before_it_is_evaluated(log):
    net = frozen_net().train().requires_grad_(True).eval()
    assert not any(m._forward_pre_hooks for m in net.modules())


def frozen_net():
    return nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8), BCN(8)).requires_grad_(False)


def test_every_model_says_so(log):
    """Though both are put in training mode before either of them runs."""
    nets = [frozen_net().train() for _ in range(2)]
    x = X.clone().requires_grad_()
    for net in nets:
        for _ in range(2):
            net(x)
    assert len(said(log)) == 2


def test_without_gradients(log):
    """A teacher, and the first pass of a checkpoint."""
    net = frozen_net().train()
    with torch.no_grad():
        net(X)
    net.eval()(X)
    assert not said(log)
    net.train()
    checkpoint(net, X.clone().requires_grad_(), use_reentrant=True).sum().backward()
    assert len(said(log)) == 1


def test_thawed_in_time(log):
    net = frozen_net().train().requires_grad_()
    net(X)
    assert not said(log)


def test_without_affine_parameters(log):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), BCN(8, affine=False)).train()
    net(X)
    assert not said(log)


@pytest.mark.parametrize(
    'again', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(again, log):
    """Of a model that has not run; its copy is another one."""
    net = frozen_net().train()
    for model in (net, again(net)):
        for _ in range(2):
            model(X.clone().requires_grad_())
    assert len(said(log)) == 2


@needs_torch(2, 6, 'its compiler takes hooks into one graph')
@pytest.mark.parametrize('freeze', [False, True])
@pytest.mark.parametrize('part', [lambda net: net, lambda net: net[1]])
def test_compiled(part, freeze, log):
    """Said when it is compiled: in one graph, which is compiled once."""
    net = frozen_net().requires_grad_(not freeze).train()
    want = copy.deepcopy(net)
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend('aot_eager')
    part(net).compile(fullgraph=True, backend=compiles)
    x = X.clone().requires_grad_()
    for _ in range(3):
        torch.testing.assert_close(net(x), want(x))
    assert compiles.frame_count == 1
    assert len(said(log)) == 2 * freeze  # of each copy


@needs_torch(2, 6, 'its compiler takes hooks into one graph')
def test_compiled_evaluation(log):
    net = frozen_net().train()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        compiled(X)
    compiled.eval()(X)
    assert not said(log)
    compiled.train()(X.clone().requires_grad_())
    assert len(said(log)) == 1
