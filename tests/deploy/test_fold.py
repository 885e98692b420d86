"""Folding, and what torch's exporters and onnxruntime make of the layers."""

import copy
import re

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvWS2d
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations

from bcn_mm import BCN, SyncBCN, WSConv1d, WSConv2d, WSConv3d
from bcn_mm.deploy import (
    UNUSED,
    AffineGroupNorm,
    Deployed,
    export_onnx,
    fold,
    largest_difference,
    onnx_difference,
)

try:
    import onnxruntime
except ImportError:
    onnxruntime = None
needs_onnx = pytest.mark.skipif(
    onnxruntime is None, reason='onnx and onnxruntime are not installed'
)


def randomize(model):
    """Nothing is identity: estimates, affine parameters, biases."""
    for layer in model.modules():
        if isinstance(layer, BCN):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 3)
            if layer.affine:
                for p in layer.parameters():
                    nn.init.uniform_(p, 0.5, 1.5)
                layer.batch_weight.data[::3] *= -1
                nn.init.normal_(layer.bias)
                nn.init.normal_(layer.batch_bias)
        elif getattr(layer, 'bias', None) is not None:
            nn.init.normal_(layer.bias)
    model.eval()  # not all of mmdet's return themselves
    return model


class Net(nn.Module):
    """Layers by name and a forward pass over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.call(self, x)


def chain(net, x):
    for layer in net.children():
        x = layer(x)
    return x


def seq(conv, norm, shape=(2, 4, 9, 8)):
    return Net(chain, conv=conv, norm=norm), shape


def used_twice():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y) + y

    return Net(forward, conv=WSConv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def after_add():
    def forward(net, x):
        return net.norm(net.a(x) + net.b(x))

    return Net(
        forward, a=WSConv2d(4, 8, 1), b=nn.Conv2d(4, 8, 1), norm=BCN(8)
    ), (2, 4, 9, 8)


def returned():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y), y

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def remembered():
    def forward(net, x):
        net.seen = net.conv(x)
        return net.norm(net.seen)

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def changed():
    def forward(net, x):
        return net.norm(net.conv(x).relu_())

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def reached_by_a_view():
    def forward(net, x):
        y = net.conv(x)
        return net.norm(y) + y.view(-1)[0]

    return Net(forward, conv=nn.Conv2d(4, 8, 3), norm=BCN(8)), (2, 4, 9, 8)


def two_convs():
    def forward(net, x):
        return net.norm(net.a(x)), net.norm(net.b(x))

    return Net(
        forward, a=WSConv2d(4, 8, 3), b=WSConv2d(4, 8, 3), norm=BCN(8)
    ), (2, 4, 9, 8)


def two_norms():
    def forward(net, x):
        y = net.conv(x)
        return net.a(y), net.b(y)

    return Net(forward, conv=WSConv2d(4, 8, 3), a=BCN(8), b=BCN(8)), (
        2, 4, 9, 8,
    )  # fmt: skip


def norm_of_the_input():
    def forward(net, x):
        return net.conv(net.norm(x))

    return Net(forward, conv=WSConv2d(4, 8, 3), norm=BCN(4)), (2, 4, 9, 8)


def pyramid(num_levels):
    """A head that three levels share."""

    def forward(net, x):
        return [net.norm(net.conv(x[..., ::s, ::s])) for s in (1, 2, 3)]

    norm = BCN(8, num_levels=num_levels)
    return Net(forward, conv=WSConv2d(4, 8, 3), norm=norm), (2, 4, 17, 13)


def tied():
    """Two convolutions with one weight, of which one has a norm."""

    def forward(net, x):
        return net.norm(net.a(x)) + net.b(x)

    net = Net(forward, a=nn.Conv2d(4, 8, 3), b=nn.Conv2d(4, 8, 3), norm=BCN(8))
    net.b.weight = net.a.weight
    return net, (2, 4, 9, 8)


def parametrized():
    conv = parametrizations.weight_norm(nn.Conv2d(4, 8, 3))
    return seq(conv, BCN(8))


FOLDS = {
    'plain': lambda: seq(nn.Conv2d(4, 8, 3, bias=False), BCN(8)),
    'bias': lambda: seq(nn.Conv2d(4, 8, 3), BCN(8)),
    'grouped': lambda: seq(
        WSConv2d(4, 8, 3, groups=2, stride=2, dilation=2), BCN(8)
    ),
    'reflect': lambda: seq(
        WSConv2d(4, 8, 3, padding=1, padding_mode='reflect'), BCN(8)
    ),
    'var': lambda: seq(WSConv2d(4, 8, 3, dialect='var'), BCN(8)),
    'biased_var': lambda: seq(WSConv2d(4, 8, 1, dialect='biased_var'), BCN(8)),
    'mmcv': lambda: seq(ConvWS2d(4, 8, 3, padding=1), BCN(8)),
    '1d': lambda: seq(WSConv1d(4, 8, 3), BCN(8), (2, 4, 9)),
    '3d': lambda: seq(WSConv3d(4, 8, 3), BCN(8), (2, 4, 5, 6, 5)),
    'transposed': lambda: seq(nn.ConvTranspose2d(4, 8, 3, groups=2), BCN(8)),
    'no affine': lambda: seq(WSConv2d(4, 8, 3), BCN(8, affine=False)),
    'estimate=False': lambda: seq(WSConv2d(4, 8, 3), BCN(8, estimate=False)),
    'groups, eps': lambda: seq(WSConv2d(4, 8, 3), BCN(8, 2, eps=1e-2)),
    'sync': lambda: seq(WSConv2d(4, 8, 3), SyncBCN(8)),
    'one position': lambda: seq(WSConv2d(4, 8, 3), BCN(8), (1, 4, 3, 3)),
    'shared head': lambda: pyramid(1),
    'tied': tied,
}
STAYS = {
    'used twice': (used_twice, r'its output also goes to add\(\)'),
    'after add': (after_add, 'not always, that of a convolution'),
    'returned': (returned, 'the output'),
    'remembered': (remembered, 'kept somewhere'),
    'changed': (changed, 'not always, that|relu_'),
    'view': (reached_by_a_view, r'view\(\)'),
    'two convolutions': (two_convs, 'comes from 2 convolutions'),
    'two norms': (two_norms, 'feeds 2 norms'),
    'input': (norm_of_the_input, 'not always, that of a convolution'),
    'levels': (lambda: pyramid(3), '3 levels'),
    'parametrized': (parametrized, 'parametrized'),
    'one channel': (
        lambda: seq(WSConv2d(4, 8, 3), BCN(8, 8)),
        'groups have one channel',
    ),
}
NETS = {**FOLDS, **{name: make for name, (make, _) in STAYS.items()}}


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


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(
    'name, folded, dtype',
    [
        ('var', False, torch.float32),
        ('var', False, torch.bfloat16),
        ('no affine', False, torch.float32),
        ('levels', False, torch.float32),
        ('levels', True, torch.float32),
    ],
)
def test_tracing_and_torch_export(name, folded, dtype):
    net, shape = NETS[name]()
    randomize(net).to(dtype)
    x, other = torch.randn(shape).to(dtype), torch.randn(3, 4, 31, 23)
    other = other.to(dtype)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        expected = net(other)
        written = fold(net, x) if folded else net
        traced = torch.jit.trace(written, x)
        exported = torch.export.export(written, (x,), dynamic_shapes=(sizes,))
        limit = 1e-5 if dtype == torch.float32 else 0.03
        for again in (traced, exported.module(), written):
            assert largest_difference(again(other), expected) < limit
    graph = [n for n in exported.graph.nodes if n.op == 'call_function']
    assert {n.target.namespace for n in graph} == {'aten'}


@needs_onnx
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('folded', [False, True], ids=['unfolded', 'folded'])
@pytest.mark.parametrize('affine', [False, True])
def test_large_pictures_are_summed_exactly(affine, folded, tmp_path):
    """As exact in onnxruntime as on small ones; one sum is 1e-5 off."""
    conv = nn.Conv2d(16, 16, 1, groups=16, bias=False)
    net = randomize(nn.Sequential(conv, BCN(16, 8, affine=affine)))
    x = torch.randn(2, 16, 480, 640) + torch.randn(16, 1, 1)
    written = fold(net, x[..., :32, :32]) if folded else net
    assert folded == any(type(m) is nn.GroupNorm for m in written)
    path = str(tmp_path / 'model.onnx')
    export_onnx(written, path, x[..., :32, :32], 'trace')
    exact = copy.deepcopy(net).double()
    session = onnxruntime.InferenceSession(path)
    with torch.no_grad():
        for size in (32, 480):
            part = x[..., :size].contiguous()
            (y,) = session.run(None, {'pictures': part.numpy()})
            y, expected = torch.from_numpy(y), exact(part.double())
            assert largest_difference(y, expected) < 2e-6
    # what was exported runs as before
    assert not any('forward' in vars(m) for m in written.modules())


@needs_onnx
@pytest.mark.filterwarnings('ignore')
def test_equal_constants(tmp_path):
    """Norms that have not been trained have equal affine parameters."""
    layers = [m for _ in range(3) for m in (nn.Conv2d(8, 8, 1), BCN(8))]
    net = nn.Sequential(*layers).eval()
    x = torch.randn(2, 8, 16, 16)
    path = str(tmp_path / 'model.onnx')
    export_onnx(fold(net, x), path, x, 'trace')
    assert onnx_difference(path, net, [x]) < 1e-5


# -- real models -------------------------------------------------------------

MODELS_OF = {
    'det': 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py',
    'seg': 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py',
}


def real_model(kind):
    if kind == 'backbone':  # bottlenecks, both stages as BatchNorm's
        return randomize(
            MODELS.build(
                dict(
                    type='mmdet.ResNet',
                    depth=50,
                    base_channels=16,
                    norm_cfg=dict(type='SyncBCN', estimate=False),
                    conv_cfg=dict(type='WSConv2d', dialect='var'),
                )
            )
        )
    cfg = Config.fromfile(MODELS_OF[kind])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return Deployed(randomize(MODELS.build(cfg.model)))


def real_pictures(real_data, kind, count=10):
    """Of different sizes, normalized."""
    folder = dict(seg='cityscapes/leftImg8bit/val').get(kind, 'coco/val2017')
    files = sorted((real_data / folder).rglob('*.[jp][pn]g'))[:count]
    assert len(files) == count
    for i, file in enumerate(files):
        picture = Image.open(file).convert('RGB')
        size = 96 + 11 * i, 170 - 7 * i
        pixels = np.asarray(picture.resize(size), np.float32)
        yield torch.from_numpy((pixels - 118) / 57).permute(2, 0, 1)[None]


@pytest.mark.slow
@pytest.mark.real_data
@needs_onnx
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('folded', [False, True], ids=['unfolded', 'folded'])
@pytest.mark.parametrize('kind', ['backbone', 'det', 'seg'])
def test_onnx_and_tracing(kind, folded, real_data, tmp_path):
    """To 1e-4 on ten pictures, in batches of one and two."""
    model = real_model(kind)
    pictures = list(real_pictures(real_data, kind))
    two = torch.cat((pictures[0], pictures[0].flip(3)))
    written = model
    if folded:
        report = []
        written = fold(model, two, report=report)
        used = [f for f in report if f.norm and f.note != UNUSED]
        assert len(used) >= 20 and all(f.conv for f in used)
    path = tmp_path / 'model.onnx'
    export_onnx(written, str(path), two, 'trace')
    assert [f.name for f in tmp_path.iterdir()] == ['model.onnx']
    assert onnx_difference(str(path), model, [*pictures, two]) < 1e-4
    traced = torch.jit.trace(written, two)
    torch.jit.save(traced, tmp_path / 'model.pt')
    traced = torch.jit.load(tmp_path / 'model.pt')
    with torch.no_grad():
        for x in pictures[3::5]:
            assert largest_difference(traced(x), model(x)) < 1e-4
            if folded:
                assert largest_difference(written(x), model(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize('kind', ['det', 'seg'])
def test_torch_export(kind, real_data):
    model = real_model(kind)
    pictures = list(real_pictures(real_data, kind, 2))
    two = torch.cat((pictures[0], pictures[0].flip(3)))
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        exported = torch.export.export(
            model, (two,), dynamic_shapes=(sizes,)
        ).module()
        for x in pictures:
            assert largest_difference(exported(x), model(x)) < 1e-4


@pytest.mark.slow
def test_components():
    """Heads that levels share, with and without estimates for each; norms
    put in by WithBCN."""
    x = [torch.randn(1, 32, s, s + 3).double() for s in (24, 12, 6)]
    head = dict(
        type='mmdet.FCOSHead', num_classes=3, in_channels=32,
        feat_channels=32, stacked_convs=2, strides=(8, 16, 32),
    )  # fmt: skip
    encoder = dict(
        type='WithBCN', component='mmdet.DilatedEncoder', in_channels=32,
        out_channels=32, block_mid_channels=16, num_residual_blocks=2,
        block_dilations=[2, 4],
    )  # fmt: skip
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
