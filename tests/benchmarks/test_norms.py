"""The norm benchmark measures what it says; its times are nobody's business here."""

import importlib
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bcn_mm.errors import InputError
from bcn_mm.ops.kernels import BACKENDS

ROOT = Path(__file__).parents[2]
NORMS = 'benchmarks/norms.py'
QUICK = ['--shapes', '1,64,8,9', '2,32,4,4', '--rounds', 2, '--threads', 1]
PHASES = {'forward', 'backward', 'both'}
COMPETE = """
import os, signal, sys
# what a shell starts in the background ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, 'benchmarks')
from competing import competing
with competing():
    os.kill(os.getpid(), {})
"""


@pytest.fixture
def bench(monkeypatch):
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    return importlib.import_module


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    processes = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, 'Popen', Popen)
    return processes


def test_a_column_is_made_by_its_backend(bench, backend, monkeypatch):
    norms, asked = bench('norms'), []
    module = sys.modules['bcn_mm.ops.batch_channel_norm']
    kernels_for = module.kernels_for

    def spy(x):
        asked.append(kernels_for(x))
        return asked[-1]

    monkeypatch.setattr(module, 'kernels_for', spy)
    inputs = norms.Inputs((1, 64, 2, 2), 'float32', 'channels_last', 'cpu')
    names = [f'BCN {name}' for name in BACKENDS]
    for name, layer in inputs.layers(names).items():
        asked.clear()
        forward, backward, both = inputs.stepper(name, layer, calls=3)()
        assert math.isclose(forward + backward, both)
        assert {id(k) for k in asked} == {id(BACKENDS[name[4:]])} and len(asked) >= 3
        assert layer.num_batches_tracked == 3 and layer.weight.grad is None
    # and without one by whatever was chosen
    (layer,) = inputs.layers(['BCN']).values()
    assert bench('norm_layers').backend_of(layer, inputs.x) == backend


def test_the_layers_that_are_measured(bench, monkeypatch):
    layers = bench('norm_layers')
    some = next(iter(BACKENDS))
    monkeypatch.setattr(
        BACKENDS[some], 'serves', lambda x: x.dtype == torch.bfloat16, raising=False
    )
    x = torch.empty(1, 1)
    names = layers.choose(None, 'cpu', ['float32'])
    assert names[:4] == ['GN', 'BN', 'BCN', 'BCN large-batch']
    assert names[4:] == [f'BCN {k}' for k, b in BACKENDS.items() if b.serves(x)]
    assert f'BCN {some}' in layers.choose(None, 'cpu', ['float32', 'bfloat16'])
    assert layers.choose(['the same compiled', 'BN'], 'cpu', ['float32']) == [
        'GN',
        'BN',
        'the same compiled',
    ]
    with pytest.raises(InputError, match=f'{some} does not serve float32 on cpu'):
        layers.choose([f'BCN {some}'], 'cpu', ['float32'])


def test_ratios_where_a_layer_serves_some_inputs_only(bench):
    tables = bench('norm_tables')

    def times(seconds):
        return dict.fromkeys(PHASES, seconds)

    cases = [{'GN': times(1), 'a': times(2)}, {'GN': times(2), 'a': times(16)}]
    cases.append({'GN': times(1)})
    summary = tables.summarize(cases, ['GN', 'a', 'b'])
    assert set(summary) == {'GN', 'a'}
    assert summary['GN']['both'] == dict(geometric_mean=1, worst=1)
    assert summary['a']['forward']['worst'] == 8
    assert math.isclose(summary['a']['forward']['geometric_mean'], 4)


def test_a_copy_reads_and_writes(bench, monkeypatch):
    measuring = bench('measuring')
    monkeypatch.setattr(measuring, 'COPIED', 4000)
    monkeypatch.setattr(measuring.Clock, 'seconds', lambda self, stamps: [0.5])
    assert measuring.copy_bandwidth('cpu', 3, lambda: None) == 16000


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_the_competitor_ends_however_the_run_does(name):
    number = getattr(signal, name)
    # communicating ends when nobody holds the pipe that the competitor inherited
    done = subprocess.run(
        [sys.executable, '-c', COMPETE.format(int(number))],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -number


def test_the_competitor_ends_with_an_error(bench, started):
    with pytest.raises(KeyError), bench('competing').competing() as process:
        assert process.poll() is None
        raise KeyError
    assert started == [process] and process.poll() is not None


def test_a_competitor_that_is_lost_is_noticed(bench, started, monkeypatch):
    competing = bench('competing')
    early = pytest.raises(RuntimeError, match='ended early')
    with early, competing.competing() as process:
        process.kill()
        process.wait()
    monkeypatch.setattr(competing, '__file__', 'nowhere.py')
    with pytest.raises(RuntimeError, match='did not start'), competing.competing():
        pass
    assert len(started) == 2 and all(p.poll() is not None for p in started)


def test_a_run_that_fails_leaves_no_competitor(bench, refused, started, monkeypatch):
    measuring = bench('measuring')

    def fail(*args):
        assert [p.poll() for p in started] == [None]
        raise ValueError('out of order')

    monkeypatch.setattr(measuring, 'interleave', fail)
    assert 'out of order' in refused(NORMS, '--busy', '--rounds', 1)
    assert len(started) == 1 and started[0].poll() is not None


def test_bad_input(refused, started, monkeypatch):
    assert '--rounds' in refused(NORMS, '--busy', '--rounds', 0)
    line = refused(NORMS, '--busy', '--device', 'cuda:1')
    assert line.startswith('error: --busy competes for the CPU') and 'cuda:1' in line
    some = next(iter(BACKENDS))
    monkeypatch.setattr(BACKENDS[some], 'serves', lambda x: False, raising=False)
    line = refused(NORMS, '--busy', '--layers', f'BCN {some}')
    assert f'{some} does not serve float32 on cpu' in line
    assert not started


@pytest.mark.slow
def test_bad_shapes_and_layers(python):
    assert 'C a multiple of 32' in python(NORMS, '--shapes', '1,48,4,4', code=2)
    shown = python(NORMS, '--layers', 'LN', code=2)
    assert all(f'BCN {name}' in shown for name in BACKENDS)


@pytest.mark.slow
def test_a_run(tmp_path, python):
    out, plot = tmp_path / 'norms.json', tmp_path / 'norms.png'
    # returns when nobody holds its output any more, the competitor included
    shown = python(NORMS, '--busy', *QUICK, '--out', out, '--plot', plot)
    for text in ('geometric mean', 'worst', 'dispatch', 'competes', 'GB/s'):
        assert text in shown
    result = json.loads(out.read_text())
    # the keys that --help lists, in its order
    listed = python(NORMS, '--help').split('With --out')[1].split('where INPUT')[0]
    assert list(result) == re.findall(r'^  (\w+)  ', listed, re.MULTILINE)
    assert result['machine']['busy'] is True
    serving = [k for k, b in BACKENDS.items() if b.serves(torch.empty(1, 1))]
    names = ['GN', 'BN', 'BCN', 'BCN large-batch', *(f'BCN {k}' for k in serving)]
    assert list(result['layers']) == ['1x64x8x9', '2x32x4x4']
    bandwidth, ratios = result['copy_bandwidth'], []
    for case, size in zip(result['layers'].values(), (4 * 64 * 72, 4 * 64 * 16)):
        assert list(case) == names
        assert [case[f'BCN {k}']['backend'] for k in serving] == serving
        assert case['GN']['backend'] is None
        for row in case.values():
            for phase, moved in dict(forward=2, backward=3, both=5).items():
                share = row['of_copy'][phase]
                assert math.isclose(share * bandwidth * row[phase], moved * size)
        ratios.append(case['BCN']['both'] / case['GN']['both'])
    for part in ('dispatch', 'summary'):
        assert list(result[part]) == ['float32 contiguous']
        (rows,) = result[part].values()
        assert list(rows) == names
        assert all(set(row) == PHASES for row in rows.values())
    of_bcn = result['summary']['float32 contiguous']['BCN']['both']
    assert math.isclose(of_bcn['geometric_mean'], math.sqrt(math.prod(ratios)))
    assert math.isclose(of_bcn['worst'], max(ratios))
    assert set(result['weights']) == {"mmcv's ConvWS", 'WSConv2d'}


@pytest.mark.slow
def test_a_run_over_settings(tmp_path, python):
    out, plot = tmp_path / 'norms.json', tmp_path / 'norms.png'
    settings = ['--dtypes', 'float32', 'bfloat16']
    settings += ['--memory-formats', 'contiguous', 'channels_last']
    layers = ['--layers', 'BN', 'BCN', 'paper in torch ops']
    shown = python(NORMS, *QUICK, *settings, *layers, '--out', out, '--plot', plot)
    assert shown.count('geometric mean') == 4 and plot.exists()
    result = json.loads(out.read_text())
    assert len(result['layers']) == 8 and len(result['weights']) == 2
    assert len(result['summary']) == len(result['dispatch']) == 4
    case = result['layers']['1x64x8x9 float32 contiguous']
    assert set(case) == {'GN', 'BN', 'BCN', 'paper in torch ops'}
    # the input, and at most four values for each of its channels
    assert 1 <= case['BCN']['kept'] <= 1 + 4.001 / 72
    assert case['paper in torch ops']['kept'] >= 3
    assert all(row['forward'] > 0 for row in case.values())
    assert not list(tmp_path.glob('*.part*'))
