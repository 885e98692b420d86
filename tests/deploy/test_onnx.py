"""What torch's exporters and onnxruntime make of the layers."""

import copy

import numpy as np
import pytest
import torch
from conftest import EXPORT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from support.deployment import NETS, randomize
from torch import nn

from bcn_mm import BCN
from bcn_mm.deploy import (
    UNUSED,
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


@EXPORT
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


@EXPORT
@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize('kind', ['det', 'seg'])
def test_torch_export(kind, real_data):
    model = real_model(kind)
    pictures = list(real_pictures(real_data, kind, 2))
    two = torch.cat((pictures[0], pictures[0].flip(3)))
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        exported = torch.export.export(model, (two,), dynamic_shapes=(sizes,)).module()
        for x in pictures:
            assert largest_difference(exported(x), model(x)) < 1e-4
