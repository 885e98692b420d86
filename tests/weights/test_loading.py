"""Foreign checkpoints, loaded into models with BCN."""

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones import ResNet
from mmengine.runner.checkpoint import load_checkpoint
from support import authors
from support.checkpoints import (
    assert_close,
    backbone,
    resnet18,
)
from torch import nn

from bcn_mm import BCN, SyncBCN
from bcn_mm.weights.authors import from_authors

# -- the dialect of weight standardization -----------------------------------


@pytest.mark.parametrize('conv, match', [('var', "'var'"), (None, 'Conv2d')])
def test_prefix_keeps_the_dialect(tmp_path, conv, match):
    """``init_cfg`` with ``prefix``, of which mmengine makes a bare dict."""
    made = from_authors(authors.DeepLab(18).state_dict())
    path = tmp_path / 'deeplab.pth'
    torch.save(dict(meta=made.meta, state_dict=made.state), path)
    more = dict(depth=18, checkpoint=path, prefix='backbone.')
    net = backbone(dialect='std', **more)
    assert torch.equal(net.conv1.weight, made.state['backbone.conv1.weight'])
    with pytest.raises(RuntimeError, match=f"conv1: .*'std'.*{match}"):
        backbone(dialect=conv, **more)
    more['prefix'] = 'neck'
    with pytest.raises(ValueError, match='neck. is not in .*deeplab.pth'):
        backbone(dialect='std', **more)


@pytest.mark.parametrize('dialect', ['std', 'var'])
def test_mmcv_conv_is_of_a_dialect(dialect, tmp_path):
    made = from_authors(authors.Backbone(18).state_dict(), dialect=dialect)
    torch.save(made.state, tmp_path / 'a.pth')
    net = ResNet(18, norm_cfg=dict(type='BCN'), conv_cfg=dict(type='ConvWS'))
    if dialect == 'std':
        load_checkpoint(net, str(tmp_path / 'a.pth'), strict=True)
    else:
        with pytest.raises(RuntimeError, match="ConvWS2d with 'std'"):
            load_checkpoint(net, str(tmp_path / 'a.pth'))


# -- BatchNorm and GroupNorm --------------------------------------------------


def batch_stage_only(self, x):
    return F.batch_norm(
        x,
        self.running_mean,
        self.running_var,
        self.batch_weight,
        self.batch_bias,
        eps=self.eps,
    )


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['BCN', 'SyncBCN'])
def test_batch_norm_checkpoint(norm, tmp_path, monkeypatch, log):
    """Torchvision's names and layout, into a stock backbone with BCN."""
    bn = authors.randomize(ResNet(50, norm_eval=False))
    state = bn.state_dict()
    state.update({'fc.weight': torch.zeros(9, 2048), 'fc.bias': torch.ones(9)})
    torch.save(state, tmp_path / 'resnet50.pth')
    net = backbone(
        dialect=None,
        depth=50,
        norm_cfg=dict(type=norm),
        checkpoint=tmp_path / 'resnet50.pth',
    )
    assert sum('BatchNorm' in line for line in log) == 1
    assert not any('standardization' in line for line in log)
    (left,) = [line for line in log if 'unexpected' in line]
    assert 'fc.weight, fc.bias' in left and 'missing' not in left
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    bn, net = bn.double(), net.double()
    with torch.no_grad():
        out = net(x)
        net.train()
        out += net(x)
        assert all(y.isfinite().all() and y.std() > 0 for y in out)
    kind = {'BCN': BCN, 'SyncBCN': SyncBCN}[norm]
    norms = [m for m in net.modules() if type(m) is kind]
    assert len(norms) == 53
    net = backbone(
        dialect=None,
        depth=50,
        norm_cfg=dict(type=norm),
        checkpoint=tmp_path / 'resnet50.pth',
    ).double()
    monkeypatch.setattr(BCN, 'forward', batch_stage_only)
    with torch.no_grad():
        assert_close(net(x), bn(x), 1e-6)


def test_batch_norm_network_is_kept_in_the_mean():
    """Its residual branches do not grow, as they would with weight 1."""
    torch.manual_seed(0)
    bn = ResNet(18, norm_eval=False, zero_init_residual=True)
    bn.init_weights()
    for m in bn.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            with torch.no_grad():
                m.weight.mul_(0.5).add_(0.1 * torch.rand_like(m.weight))
                m.bias.normal_(0, 0.1)
    bn(torch.randn(16, 3, 64, 64))
    bn.eval()
    net = backbone(depth=18, dialect=None)
    net.load_state_dict(bn.state_dict())
    x = torch.randn(4, 3, 64, 64)
    kept = relative_distances(net(x), bn(x))
    for m in net.modules():
        if isinstance(m, BCN):
            nn.init.ones_(m.weight), nn.init.zeros_(m.bias)
    scaled = relative_distances(net(x), bn(x))
    for ours, other in zip(kept, scaled):
        assert ours < 0.5 and ours < other / 5, (kept, scaled)


def relative_distances(outputs, wanted):
    return [float((a - b).norm() / b.norm()) for a, b in zip(outputs, wanted)]


def test_ws_model_says_that_batch_norm_weights_are_not_its_own(tmp_path, log):
    torch.save(ResNet(18).state_dict(), tmp_path / 'resnet18.pth')
    for _ in range(2):
        log.clear()
        backbone(depth=18, checkpoint=tmp_path / 'resnet18.pth')
        said = [x for x in log if 'standardization' in x]
        assert len(said) == 1
        assert 'BatchNorm model and does not say' in said[0]
    log.clear()
    net = resnet18()
    net.load_state_dict(net.state_dict())
    assert not log


@pytest.mark.parametrize('names', ['bn', 'gn'])
def test_group_norm_checkpoint(names, tmp_path, log):
    """jhu's layout: per-channel pairs, no estimates, either's names."""
    gn = ResNet(
        18,
        norm_cfg=dict(type='GN', num_groups=32),
        conv_cfg=dict(type='ConvWS'),
        norm_eval=False,
    )
    for m in gn.modules():
        if isinstance(m, nn.GroupNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    state = {k.replace('gn', names): v for k, v in gn.state_dict().items()}
    torch.save(state, tmp_path / 'jhu.pth')
    net = backbone(depth=18, dialect='std', checkpoint=tmp_path / 'jhu.pth')
    assert sum('GroupNorm' in line for line in log) == 1
    assert sum('standardization' in line for line in log) == 1
    assert not any('missing' in line or 'unexpected' in line for line in log)
    for name in ('bn1', 'layer3.0.downsample.1'):
        own = net.get_submodule(name)
        theirs = gn.get_submodule(name.replace('bn', 'gn'))
        assert torch.equal(own.batch_weight, theirs.weight)
        assert torch.equal(own.batch_bias, theirs.bias)
        assert (own.running_mean == 0).all() and (own.running_var == 1).all()
    # closer than without the pairs, and than without restored groups
    x = torch.randn(2, 3, 64, 64)
    gn.eval()
    want = gn(x)

    def distance():
        return [float((a - b).norm()) for a, b in zip(net(x), want)]

    restored = distance()
    norms = [m for m in net.modules() if isinstance(m, BCN)]
    for m in norms:
        nn.init.ones_(m.weight), nn.init.zeros_(m.bias)
    in_batch_stage = distance()
    for m in norms:
        nn.init.ones_(m.batch_weight), nn.init.zeros_(m.batch_bias)
    for a, b, c in zip(restored, in_batch_stage, distance()):
        assert a < b < c


def test_group_norm_whose_channels_agree_is_exact():
    """Within each group, that is; estimates at their start."""
    gn, layer = nn.GroupNorm(32, 128).double(), BCN(128).double().eval()
    for value in (gn.weight, gn.bias):
        with torch.no_grad():
            value.copy_(torch.rand(32).repeat_interleave(4) + 0.5)
    layer.load_state_dict(gn.state_dict())
    x = torch.randn(2, 128, 5, 5, dtype=torch.double)
    torch.testing.assert_close(layer(x), gn(x), rtol=1e-4, atol=1e-4)
