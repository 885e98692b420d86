"""tools/deployment/, as users run it."""

import re

import pytest
import torch
from conftest import ROOT

import bcn_mm
from bcn_mm.deploy import OPSET

pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
pytest.importorskip('onnxscript', reason='onnxscript is not installed')

TOOL = 'tools/deployment/export_onnx.py'
DET = 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py'
SEG = 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py'


@pytest.mark.slow
@pytest.mark.real_data
def test_detector(real_data, tmp_path, python):
    """Folded, by torch's current exporter, with a checkpoint."""
    import onnx

    model = bcn_mm.get_model('mask-rcnn_r18_bcn-ws_shapes')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    out = tmp_path / 'new' / 'model.onnx'
    shown = python(
        TOOL,
        DET,
        tmp_path / 'model.pth',
        '--out',
        out,
        '--fold',
        '--count',
        2,
        '--images',
        real_data / 'coco' / 'val2017',
    )
    lines = [line for line in shown.splitlines() if line.startswith('Wrote')]
    assert re.search(
        r'folded 28 of 28 norms, largest relative difference to PyTorch '
        r'\d\.\de-\d+ on 2 pictures of 448x640 to 640x\d+$',
        lines[0],
    )
    assert [f.name for f in out.parent.iterdir()] == ['model.onnx']
    proto = onnx.load(out)
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in sizes] == [
        'batch',
        3,
        'height',
        'width',
    ]
    assert str(ROOT).encode() not in out.read_bytes()
    assert b'site-packages' not in out.read_bytes()


@pytest.mark.slow
@pytest.mark.real_data
def test_a_recipe_without_its_checkpoint(real_data, tmp_path, python):
    """From random weights that a ResNet-50 keeps exact at its own scale."""
    shown = python(
        TOOL,
        'configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py',
        '--out',
        tmp_path / 'model.onnx',
        '--exporter',
        'trace',
        '--count',
        1,
        '--images',
        real_data / 'coco' / 'val2017',
    )
    assert re.search('Wrote .* on 1 pictures of 8..x12', shown), shown


@pytest.mark.slow
@pytest.mark.real_data
def test_segmenter(real_data, tmp_path, python, refused):
    """Its backbone, by the older exporter; and what is not exact enough."""
    out = tmp_path / 'model.onnx'
    words = [
        TOOL,
        SEG,
        '--out',
        out,
        '--part',
        'backbone',
        '--exporter',
        'trace',
        '--count',
        1,
        '--images',
        real_data / 'cityscapes' / 'leftImg8bit' / 'val' / 'cambridge',
    ]
    shown = python(*words)
    assert re.search(r'Wrote .*: largest relative .* on 1 pictures', shown)
    written = out.read_bytes()
    line = refused(*words, '--tolerance', '1e-12')
    assert 'more than --tolerance 1e-12; nothing was written' in line
    assert out.read_bytes() == written
    assert [f.name for f in tmp_path.iterdir()] == ['model.onnx']


OUT = ['--out', 'none.onnx']
BAD = {
    'suffix': ([DET, '--out', 'none.pt'], 'must be an .onnx file'),
    'count': ([DET, *OUT, '--count', 0], '--count must be at least 1'),
    'tolerance': ([DET, *OUT, '--tolerance', 0], '--tolerance must be pos'),
    'opset': ([DET, *OUT, '--opset', 9], f'--opset must be at least {OPSET}'),
    'no pictures': ([DET, *OUT, '--images', 'configs'], 'no pictures'),
    'no picture': ([DET, *OUT, '--images', 'x.jpg'], 'no picture or folder'),
    'no test set': (
        [DET, *OUT, '--cfg-options', 'test_dataloader.dataset.data_root=x/'],
        'test set .* is not there; give --images',
    ),
    'damaged': ([DET, *OUT, '--images', DET], 'damaged or no picture'),
    'no model': (['configs/_base_/bcn.py', *OUT], 'bcn.py has no model'),
    'option': (
        [DET, *OUT, '--cfg-options', 'model.neck.norm_cfg.num_groups=7'],
        'does not divide',
    ),
}


@pytest.mark.parametrize('words, message', BAD.values(), ids=BAD)
def test_bad_input(words, message, refused):
    line = refused(TOOL, *words)
    assert line.startswith('error: ') and re.search(message, line), line
    assert not (ROOT / 'none.onnx').exists()
