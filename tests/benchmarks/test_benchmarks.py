"""The benchmarks run; their times are nobody's business here."""

import json

import pytest

pytestmark = pytest.mark.slow
MODEL = 'benchmarks/model.py'
INFERENCE = 'benchmarks/inference.py'


@pytest.mark.parametrize(
    'config', ['mask-rcnn_r18_bn_shapes', 'deeplabv3_r18-d8_bcn-ws_shapes']
)
def test_benchmark_model(tmp_path, python, config):
    out, plot = tmp_path / 'model.json', tmp_path / 'model.png'
    variants = ['BN'] if 'rcnn' in config else []
    hook = ['--hook'] if 'rcnn' in config else []
    shown = python(
        MODEL,
        f'configs/quickstart/{config}.py',
        '--shape',
        64,
        96,
        '--rounds',
        1,
        '--variants',
        'BCN + WSConv2d',
        *variants,
        *hook,
        '--out',
        out,
        '--plot',
        plot,
    )
    assert 'share' in shown and plot.exists()
    result = json.loads(out.read_text())
    models = result['models']
    assert bool(result['hook']) == bool(hook) == ('hook measures' in shown)
    assert set(models) == {'GN + ConvWS', 'BCN + WSConv2d', *variants}
    # the same norms are there, all of them timed within the step
    assert len({row['layers'] for row in models.values()}) == 1
    for row in models.values():
        assert 0 < row['norms'] < row['step'] and row['peak'] > 0


def test_benchmark_model_of_what_cannot_be_trained(python):
    config = 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py'
    shown = python(MODEL, config, '--shape', 64, 96, '--rounds', 1, code=1)
    assert 'BN cannot train this: Expected more than 1 value' in shown
    shown = python(MODEL, config, '--shape', 8, 8, code=1)
    assert '--shape at least 32 32' in shown
    shown = python(MODEL, config, '--cfg-options', 'default_scope=mmocr', code=1)
    assert "scope 'mmocr'" in shown


def test_benchmark_inference(tmp_path, python, refused):
    config = 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py'
    out = tmp_path / 'inference.json'
    shown = python(INFERENCE, config, '--shape', 64, 96, '--rounds', 1, '--out', out)
    assert 'BCN, folded' in shown and out.exists()
    line = refused(INFERENCE, config, '--shape', 8, 8)
    assert line.startswith('error: --shape must be at least 32 32')
