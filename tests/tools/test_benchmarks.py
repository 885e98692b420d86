"""The benchmarks run; their times are nobody's business here."""

import json

import pytest

pytestmark = pytest.mark.slow
SCRIPT = 'tools/analysis_tools/benchmark_norms.py'


def test_benchmark_norms(tmp_path, python):
    out, plot = tmp_path / 'norms.json', tmp_path / 'norms.png'
    shown = python(
        SCRIPT, '--shapes', '1,64,8,9', '2,32,4,4', '--rounds', 2,
        '--dtypes', 'float32', 'bfloat16', '--memory-formats', 'contiguous',
        'channels_last', '--layers', 'BN', 'BCN', 'paper in torch ops',
        '--out', out, '--plot', plot,
    )  # fmt: skip
    assert 'geometric mean' in shown and plot.exists()
    result = json.loads(out.read_text())
    assert len(result['layers']) == 8 and len(result['weights']) == 2
    case = result['layers']['1x64x8x9 float32 contiguous']
    assert set(case) == {'GN', 'BN', 'BCN', 'paper in torch ops'}
    # the input, and at most four values for each of its channels
    assert 1 <= case['BCN']['kept'] <= 1 + 4.001 / 72
    assert case['paper in torch ops']['kept'] >= 3
    assert all(row['forward'] > 0 for row in case.values())
    assert not list(tmp_path.glob('*.part*'))


def test_bad_input(python):
    assert 'C a multiple of 32' in python(
        SCRIPT, '--shapes', '1,48,4,4', code=2
    )
    assert '--rounds' in python(SCRIPT, '--rounds', 0, code=1)
