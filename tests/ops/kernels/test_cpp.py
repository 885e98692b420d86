"""What is compiled for the CPU: whole passes, threads, and what may go wrong."""

import copy
import logging
import shutil
import sys

import pytest
import torch
from conftest import ROOT, needs_torch, run
from support.operands import AFFINE, LAYOUTS, operands
from torch import nn

from bcn_mm import BCN
from bcn_mm.ops import batch_channel_norm
from bcn_mm.ops.estimates import Rule, Running
from bcn_mm.ops.kernels import cpp, eager, kernels_for, native, using
from bcn_mm.ops.stages import Affine, Spec

COMPILED = pytest.mark.skipif(
    cpp.operators() is None, reason='the kernels for the CPU are not compiled'
)
# by group, by sample, in parts of a long sample, single values
SHAPES = [
    (1, 64, 40, 40),
    (3, 32, 70, 70),
    (40, 64, 7, 7),
    (2, 8, 200, 200),
    (3000, 16),
    (1, 6, 90, 90),
    (6, 5, 70, 70),
]
STAGES = [(True, True), (True, False), (False, True)]


def whole_pass(x, dy, threads, training, estimate, relu=False):
    """Everything that a pass forward and one back give."""
    torch.manual_seed(0)
    channels, groups = x.shape[1], 1 + (x.shape[1] % 2 == 0)
    given = operands(channels, groups, torch.float)
    running = Running(given.pop('running_mean'), given.pop('running_var'), None)
    affine, spec = Affine(**given), Spec(groups, 1e-5, relu)
    rule = Rule(training, estimate, 0.1, 'identity', 1e-5)
    kernels, before = cpp.Cpp(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, saved = kernels.forward(x, running, rule, affine, spec)
        dx, grads = kernels.backward(dy, x, saved, affine, rule, spec, True)
    finally:
        torch.set_num_threads(before)
    return [y, *saved, dx, *grads, *running[:2]]


@COMPILED
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('training, estimate', STAGES)
@pytest.mark.parametrize('relu', [False, True])
def test_threads_change_nothing(shape, layout, training, estimate, relu):
    """...where a pass is shared out in another way, but rounding."""
    x, dy = (layout(torch.randn(shape) + 0.5) for _ in range(2))
    alone = whole_pass(x, dy, 1, training, estimate, relu)
    for threads in (2, 3, 7):
        several = whole_pass(x, dy, threads, training, estimate, relu)
        again = whole_pass(x, dy, threads, training, estimate, relu)
        for want, got, same in zip(alone, several, again):
            assert torch.equal(got, same)
            size = max(1, want.abs().max().item())
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * size)


@COMPILED
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('training, estimate', STAGES)
def test_relu_inside_a_whole_pass(layout, training, estimate):
    x, dy = (layout(torch.randn(3, 8, 9, 9)) for _ in range(2))
    plain = whole_pass(x, dy, 1, training, estimate)[0]
    y, saved, *got = whole_pass(x, dy, 1, training, estimate, relu=True)
    assert torch.equal(y, plain.relu())
    masked = torch.where(plain <= 0, 0, dy)
    _, same, *want = whole_pass(x, masked, 1, training, estimate)
    assert torch.equal(saved, same)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@COMPILED
def test_every_instruction_set_keeps_the_contract(python):
    """Those of this machine, as torch is told to use them."""
    for name in ('default', 'avx2'):
        out = python(
            *('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-n0'),
            *('tests/ops/kernels/test_contract.py', '-k', 'cpp and not portions'),
            ATEN_CPU_CAPABILITY=name,
        )
        assert ' passed' in out and 'failed' not in out


@COMPILED
@needs_torch(2, 4, 'checks of operators')
@pytest.mark.parametrize('training', [True, False])
def test_operators_are_what_they_say(training):
    """Schemas, what they write into, and their fakes."""
    ops, (x, dy) = cpp.operators(), torch.randn(2, 2, 4, 3, 3)
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    affine = [torch.randn(n) for n in (4, 4, 2, 2)]
    forward = (x, mean, var, count, *affine, 2, 1e-5, False)
    forward += (training, True, 0.1, 'first', torch.zeros(2, 4).double(), False)
    forward += (torch.zeros(2, 2, 4),)
    saved = ops.forward(*forward)[1]
    rows = torch.randn(5, 2, 4)
    weight = torch.randn(4, 3, 2, 2)
    standardized = ops.standardize(weight, 1e-5, True, False)[1]
    for name, args in dict(
        forward=forward,
        backward=(dy, x, saved, *affine, 2, 1e-5, False, True, True),
        moments=(x,),
        apply=(x, *rows[:3], True, dy),
        reduce=(dy, x, rows[0]),
        apply_add=(dy, x, *rows),
        standardize=(weight, 1e-5, True, False),
        standardize_backward=(weight, weight, standardized),
    ).items():
        torch.library.opcheck(
            getattr(ops, name).default,
            args,
            test_utils=('test_schema', 'test_faketensor'),
        )


@COMPILED
def test_a_moved_buffer_is_a_changed_tensor():
    """Autograd finds out if something else had kept it."""
    layer, scale = BCN(4, 2), torch.ones(4, requires_grad=True)
    kept = (scale * layer.running_mean).sum()
    layer(torch.randn(2, 4, 3, 3))
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        kept.backward()
    with torch.inference_mode():
        BCN(4, 2)(torch.randn(2, 4, 3, 3))


@COMPILED
@pytest.mark.parametrize('shape', [(2, 1, 1, 1), (1, 4, 3, 3), (3, 4, 1, 1), (1, 6)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_strides_of_single_values_mean_nothing(shape, layout):
    def odd(x):
        strides = [t if n > 1 else 17 for n, t in zip(x.shape, x.stride())]
        return torch.empty(200).as_strided(shape, strides).copy_(x)

    x, dy = (layout(torch.randn(shape)) for _ in range(2))
    for training, estimate in STAGES:
        want = whole_pass(x, dy, 1, training, estimate)
        for got in (
            whole_pass(odd(x), dy, 1, training, estimate),
            whole_pass(x, odd(dy), 1, training, estimate),
        ):
            assert all(map(torch.equal, got, want))


@COMPILED
@pytest.mark.parametrize('kept', [*AFFINE, 'running_mean', 'running_var', ''])
@pytest.mark.parametrize('training', [True, False])
def test_what_is_not_loaded_is_not_computed_with(kept, training):
    """One tensor on meta; the dispatcher would have the answer made up."""
    given = operands(4, 2, torch.float)
    count = torch.tensor(0)
    if kept:
        given[kept] = given[kept].to('meta')
    else:
        count = count.to('meta')
    how = dict(training=training, num_batches_tracked=count)
    x = torch.randn(2, 4, 3, 3)
    with using('cpp'):
        if not kept and not training:  # which asks for no counter
            want = batch_channel_norm(x, 2, **given)
            assert torch.equal(batch_channel_norm(x, 2, **given, **how), want)
            return
        with pytest.raises(RuntimeError, match='on meta'):
            batch_channel_norm(x, 2, **given, **how)


@COMPILED
def test_what_is_refused_is_not_counted():
    count, x = torch.tensor(0), torch.randn(2, 4, 3, 3)
    given = operands(4, 2, torch.float)
    given['weight'] = torch.ones(3)
    with using('cpp'), pytest.raises(RuntimeError, match='expected 2 values'):
        batch_channel_norm(x, 2, **given, training=True, num_batches_tracked=count)
    assert count == 0


@COMPILED
@needs_torch(2, 1, 'floats of 8 bits')
@pytest.mark.parametrize('training', [True, False])
def test_estimates_of_8_bits_are_refused(training):
    mean, var = torch.zeros(64), torch.ones(64)
    mean, var = (t.to(torch.float8_e4m3fn) for t in (mean, var))
    with using('cpp'), pytest.raises(RuntimeError, match='running statistics of 64'):
        batch_channel_norm(torch.randn(2, 64, 3, 3), 2, mean, var, training=training)


@COMPILED
def test_a_layer_that_is_read_without_copies_and_counters():
    source, x = BCN(4, 2).eval(), torch.randn(2, 4, 3, 3)
    state = source.state_dict()
    del state['num_batches_tracked']
    with torch.device('meta'):
        layer = BCN(4, 2).eval()
    layer.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize('name', AFFINE)
def test_parameters_of_any_strides(backend, name):
    given = operands(4, 2, torch.float)
    given = {k: v.requires_grad_(k in AFFINE) for k, v in given.items()}
    x, dy = torch.randn(2, 2, 4, 3, 3)
    results = []
    for strided in (False, True):
        if strided:  # every other value of twice as many
            wide = given[name].detach().repeat_interleave(2)
            given[name] = wide.requires_grad_()[::2]
        y = batch_channel_norm(x, 2, **given)
        leaves = [given[k] for k in AFFINE]
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@COMPILED
def test_differentiable_once():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(BCN(4, 2)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.sum().backward()


# -- what may go wrong ---------------------------------------------------------


def answer():
    """A small computation, and who made it."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    given = operands(4, 2, torch.float)
    y = batch_channel_norm(x, 2, **given, training=True)
    y.square().sum().backward()
    return type(kernels_for(x)), y.detach(), x.grad


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where libraries are looked for."""
    monkeypatch.setattr(cpp, '_FOLDER', tmp_path)
    cpp.operators.cache_clear()
    yield tmp_path
    cpp.operators.cache_clear()


@pytest.mark.parametrize('case', ['none', 'of another torch', 'no library'])
def test_goes_on_without(folder, caplog, case):
    own = folder / cpp.library_name(torch.__version__)
    other = folder / cpp.library_name('2.0.9+cpu')
    if case == 'of another torch':
        other.write_bytes(b'never opened')
    elif case == 'no library':
        own.write_bytes(b'not a library')
    with caplog.at_level(logging.WARNING):
        used, *got = answer()
        answer()
    with using('eager'):
        _, *want = answer()
    assert used in (native.Native, eager.Eager)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == (case != 'none')
    for line in lines:
        assert '\n' not in line and 'pip install --no-build-isolation -e .' in line
    with using('cpp'), pytest.raises(RuntimeError, match='cpp does not serve'):
        answer()


def build(folder, **environment):
    """Compile the kernels into a folder; returns what was said and made."""
    shutil.copytree(ROOT / 'csrc', folder / 'csrc')
    done = run(
        sys.executable,
        *('setup.py', '-q', 'build_ext', '-b', folder, '-t', folder / 'objects'),
        **environment,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout, list(folder.rglob('*.so'))


@pytest.mark.parametrize(
    'environment',
    [
        dict(CXX='false', CC='false'),
        dict(CXX='no-such-compiler', CC='no-such-compiler'),
    ],
    ids=['fails', 'is not there'],
)
def test_without_a_compiler(tmp_path, environment):
    said, made = build(tmp_path, **environment)
    assert not made
    (line,) = [x for x in said.splitlines() if x.startswith('bcn_mm: ')]
    assert 'did not compile, and BCN runs without them' in line


def test_left_out(tmp_path):
    said, made = build(tmp_path, BCN_MM_BUILD='0')
    assert not made and 'bcn_mm: ' not in said


@COMPILED
def test_models_train_alike(monkeypatch):
    """A network in both layouts, by the compiled kernels and by ordinary ones."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), BCN(16), nn.ReLU(True)),
        *(nn.Conv2d(16, 32, 3, bias=False), BCN(32, estimate=False), nn.ReLU(True)),
    )
    for layout in LAYOUTS:
        results = []
        for choice in ('cpp', 'eager'):
            own = copy.deepcopy(net)
            optimizer = torch.optim.SGD(own.parameters(), 0.1)
            torch.manual_seed(1)
            with using(choice):
                for _ in range(5):
                    optimizer.zero_grad()
                    own(layout(torch.randn(2, 3, 20, 20))).square().mean().backward()
                    optimizer.step()
            results.append(own.state_dict())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
