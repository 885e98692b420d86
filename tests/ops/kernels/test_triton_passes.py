"""Whole passes in Triton against the definition, through its interpreter.

Triton must be imported with TRITON_INTERPRET=1, so this is skipped unless it
is; test_triton.py runs it in a process of its own. The interpreter cuts off
where a card rounds to bfloat16.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.operands import LAYOUTS
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN
from bcn_mm.ops import DIALECTS, standardize_weight
from bcn_mm.ops.estimates import Rule, Running
from bcn_mm.ops.kernels import BACKENDS, eager, trial, triton, using
from bcn_mm.ops.stages import Affine, Batch, Spec

if os.environ.get('TRITON_INTERPRET') != '1':
    pytest.skip(
        'test_triton.py runs it with TRITON_INTERPRET=1', allow_module_level=True
    )

import triton as library
import triton.language as tl

from bcn_mm.ops.kernels.triton_kernels import _offsets

KERNELS = BACKENDS['triton']
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_START = [
    *((m, s) for m in (0.25, 1.0) for s in ('identity', 'first', 'average')),
    (None, 'identity'),
    (None, 'average'),
]
both_stages = pytest.mark.parametrize('estimate', [True, False])
every_layout = pytest.mark.parametrize('layout', LAYOUTS)


class Case:
    """Operands of a pass, and the same in float64."""

    def __init__(self, shape, groups, dtype=torch.float32, layout=None, mean=1.0):
        channels = shape[1]
        self.x = (torch.randn(shape) + mean).to(dtype)
        self.dy = torch.randn(shape).to(dtype)
        if layout is not None:
            self.x, self.dy = layout(self.x), layout(self.dy)
        self.affine = Affine(
            torch.rand(channels) + 0.5,
            torch.randn(channels),
            torch.rand(groups) + 0.5,
            torch.randn(groups),
        )
        self.mean = torch.randn(channels) + mean
        self.var = torch.rand(channels) + 0.5
        self.groups = groups

    def running(self, count=0):
        return Running(self.mean.clone(), self.var.clone(), torch.tensor(count))

    def definition(self, training, estimate, relu, momentum=0.25):
        x = self.x.double().requires_grad_()
        leaves = [p.double().requires_grad_() for p in self.affine]
        y, *moved = reference.bcn(
            x,
            self.groups,
            self.mean.double(),
            self.var.double(),
            *leaves,
            training,
            estimate,
            momentum,
        )
        if relu:
            # where rounding decides about the ReLU, nothing is asked for
            self.dy = self.dy * (y.abs() > 1e-2)
            y = y.clamp_min(0)
        grads = torch.autograd.grad(y, [x, *leaves], self.dy.double())
        return y.detach(), grads, moved


def passes(case, training, estimate, relu, momentum=0.25, start='identity'):
    rule = Rule(training, estimate, momentum, start, 1e-5)
    spec, running = Spec(case.groups, 1e-5, relu), case.running()
    y, saved = KERNELS.forward(case.x, running, rule, case.affine, spec)
    affine = case.affine if relu else case.affine._replace(bias=None)
    # they move before the backward pass, which must not see that
    kept = [t.clone() for t in running]
    for t in running:
        t.fill_(7)
    dx, grads = KERNELS.backward(case.dy, case.x, saved, affine, rule, spec, True)
    return y, (dx, *grads), kept


def close(got, want, slack=1e-5):
    """Within ``slack``, and two roundings, of the largest value."""
    assert got.shape == want.shape
    slack += 2 * torch.finfo(got.dtype).eps
    size = max(want.abs().max().item(), 1e-3)
    assert (got.double() - want).abs().max() <= slack * size


@pytest.mark.parametrize('momentum, start', EVERY_START)
@pytest.mark.parametrize('shape', [(1, 4, 39, 41), (3, 6, 5, 7)])
def test_a_start_far_from_zero_does_not_cancel(momentum, start, shape):
    case = Case(shape, 2)
    case.x = case.x * 0.01 + 300
    case.mean, case.var = torch.zeros(shape[1]), torch.ones(shape[1])
    _, _, (mean, var, _) = passes(case, True, True, False, momentum, start)
    across = case.x.double().transpose(0, 1).flatten(1)
    if momentum is None or (start != 'identity' and momentum < 1):
        torch.testing.assert_close(mean.double(), across.mean(1), rtol=2e-7, atol=0)
        want = across.var(1, correction=0)
    else:
        want = across.square().mean(1) * momentum + (1 - momentum)
    torch.testing.assert_close(var.double(), want, rtol=1e-2, atol=0)


def test_one_sample_far_from_the_others_does_not_cancel():
    case = Case((300, 4, 2, 2), 2)
    case.x[0] += 1e4
    case.mean, case.var = torch.zeros(4), torch.ones(4)
    _, _, (mean, var, _) = passes(case, True, True, False, 0.01, 'first')
    across = case.x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), across.mean(1), rtol=1e-6, atol=0)
    want = across.var(1, correction=0)
    torch.testing.assert_close(var.double(), want, rtol=2e-6, atol=0)


def check(case, training, estimate, relu, slack=1e-5):
    y, grads, moved = case.definition(training, estimate, relu)
    got_y, got_grads, (mean, var, count) = passes(case, training, estimate, relu)
    assert got_y.dtype == case.x.dtype and got_y.stride() == case.x.stride()
    assert got_grads[0].dtype == case.x.dtype
    assert got_grads[0].stride() == case.x.stride()
    close(got_y, y, slack)
    for got, want in zip(got_grads, grads):
        close(got, want, 10 * slack)
    for got, want in zip((mean, var), moved):
        close(got, want, slack)
    assert count == int(training)


@every_layout
@both_stages
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize(
    'shape, groups',
    [
        ((2, 6, 5, 7), 3),
        ((1, 4, 39, 41), 2),  # rows of several chunks
    ],
)
def test_passes_are_the_definition(layout, estimate, training, relu, shape, groups):
    check(Case(shape, groups, layout=layout), training, estimate, relu)


@every_layout
@both_stages
@pytest.mark.parametrize('shape', [(3, 70, 3, 2), (70, 16, 2, 1)])
def test_a_group_of_several_tiles(layout, estimate, shape):
    """...of channels, or of samples."""
    check(Case(shape, 1, layout=layout), True, estimate, False)


@both_stages
@pytest.mark.parametrize(
    'shape', [(5, 6), (1, 6), (2, 6, 9), (2, 6, 1, 1), (2, 6, 2, 3, 4)]
)
def test_every_number_of_dimensions(estimate, shape):
    for layout in LAYOUTS:
        case = Case(shape, 2, layout=layout)
        if shape == (1, 6) and not estimate:
            y, *_ = passes(case, True, estimate, False)
            # a batch of one value is its own mean
            want, *_ = case.definition(True, estimate, False)
            close(y, want)
        else:
            check(case, True, estimate, False, 1e-4)


@every_layout
@both_stages
@pytest.mark.parametrize('dtype', DTYPES[1:])
@pytest.mark.parametrize('mean', [1.0, 50.0])
def test_half_precision_is_read_as_it_is(layout, estimate, dtype, mean):
    case = Case((2, 6, 9, 7), 3, dtype, layout, mean)
    check(case, True, estimate, False, 1e-4)
    check(case, True, estimate, True, 1e-4)


@settings(max_examples=15)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)
    ),
    of_channels=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    training=st.booleans(),
    seed=st.integers(0, 999),
)
def test_odd_sizes(shape, of_channels, layout, training, seed):
    torch.manual_seed(seed)
    groups = max(g for g in range(1, of_channels + 1) if shape[1] % g == 0)
    case = Case(shape, groups, layout=layout)
    check(case, training, True, False, 1e-3)


@both_stages
@pytest.mark.parametrize('momentum, start', EVERY_START)
def test_estimates_after_several_passes(estimate, momentum, start):
    case = Case((3, 4, 3, 5), 2)
    running = case.running()
    mean, var = case.mean.double(), case.var.double()
    for passed in range(1, 5):
        x = case.x * passed - passed
        rule = Rule(True, estimate, momentum, start, 1e-5)
        KERNELS.forward(x, running, rule, case.affine, Spec(2, 1e-5))
        x = x.double()
        rate = {
            'identity': momentum,
            'first': 1.0 if passed == 1 else momentum,
            'average': max(1 / passed, momentum or 0),
        }['average' if momentum is None else start]
        m = x.mean((0, 2, 3))
        if estimate:
            s = (x - mean[:, None, None]).square().mean((0, 2, 3))
            if momentum is None or (start != 'identity' and rate > momentum):
                s = s - rate * (m - mean).square()
        else:
            s = x.transpose(0, 1).flatten(1).var(1)
        mean, var = mean + rate * (m - mean), var + rate * (s - var)
        assert running.num_batches_tracked == passed
        close(running.mean, mean)
        close(running.var, var)


@both_stages
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_estimates_of_another_dtype_and_layout(estimate, dtype):
    case = Case((3, 4, 3, 5), 2)
    buffers = torch.stack((case.mean, case.var), 1).to(dtype)
    mean, var = buffers.unbind(1)  # not contiguous
    rule = Rule(True, estimate, 0.25, 'identity', 1e-5)
    running = Running(mean, var, None)
    y, _ = KERNELS.forward(case.x, running, rule, case.affine, Spec(2, 1e-5))
    want, _, moved = case.definition(True, estimate, False)
    slack = 1e-2 if dtype == torch.float16 else 1e-6
    close(y, want, slack)
    close(buffers, torch.stack(moved, 1), slack)


@both_stages
@pytest.mark.parametrize('training', [True, False])
def test_a_repetition_sees_what_its_first_run_saw(estimate, training):
    case, spec = Case((3, 4, 3, 5), 2), Spec(2, 1e-5)
    rule = Rule(training, estimate, 0.25, 'identity', 1e-5)
    running, batch = case.running(), torch.empty(2, 4, dtype=torch.float64)
    known = case.x, running, rule, case.affine, spec
    y, saved = KERNELS.forward(*known, batch, False)
    plain, _ = KERNELS.forward(case.x, case.running(), rule, case.affine, spec)
    assert torch.equal(y, plain)
    moved = [t.clone() for t in running]
    KERNELS.forward(*known)
    later = [t.clone() for t in running]
    again, saved_again = KERNELS.forward(*known, batch, True)
    assert torch.equal(again, y) and torch.equal(saved_again[0], saved[0])
    assert all(map(torch.equal, running, later))
    assert torch.equal(moved[0], later[0]) != training


@both_stages
def test_channels_that_are_not_finite_keep_their_estimates(estimate):
    case = Case((2, 4, 3, 3), 4)
    before = case.running()
    case.x[0, 1, 2, 2], case.x[1, 2, 0, 0] = float('nan'), float('inf')
    case.x[1, 3] *= 1e30  # whose square overflows
    y, _, moved = passes(case, True, estimate, False)
    for old, new in zip(before[:2], moved):
        assert torch.equal(old[1:], new[1:])
        assert old[0] != new[0]
    assert moved[2] == 1
    assert torch.isfinite(y[:, 0]).all() and not torch.isfinite(y[0, 1]).all()


def test_what_is_not_given():
    case = Case((2, 4, 3, 3), 2)
    full, case.affine = case.affine, Affine(None, None, None, None)
    ones = Affine(torch.ones(4), torch.zeros(4), torch.ones(2), torch.zeros(2))
    for estimate in (True, False):
        y, grads, _ = passes(case, True, estimate, False)
        assert all(g is None for g in grads[1:])
        plain = Case((2, 4, 3, 3), 2)
        plain.__dict__.update(vars(case), affine=ones)
        want_y, want, _ = plain.definition(True, estimate, False)
        close(y, want_y)
        close(grads[0], want[0], 1e-4)
    spec, rule = Spec(2, 1e-5), Rule(True, True, 0.1, 'first', 1e-5)
    running = case.running()
    with pytest.raises(ValueError, match='needs num_batches_tracked'):
        KERNELS.forward(case.x, Running(*running[:2], None), rule, full, spec)
    _, saved = KERNELS.forward(case.x, running, rule, full, spec)
    known = case.dy, case.x, saved, full._replace(bias=None), rule, spec
    dx, grads = KERNELS.backward(*known, False)
    assert dx is None
    for got, want in zip(grads, KERNELS.backward(*known, True)[1]):
        assert torch.equal(got, want)


@every_layout
@pytest.mark.parametrize('ratio, error', [(1e2, 1e-6), (1e4, 1e-5), (1e5, 1e-4)])
def test_variance_of_large_means(layout, ratio, error):
    x = layout(torch.randn(1, 2, 80, 70) + ratio)
    x[0, 1, 0, 0] = 0  # far from the rest, and the first
    mean, var, _ = KERNELS.moments(x)
    want = x.double().flatten(2).var(2, unbiased=False)
    torch.testing.assert_close(var.double(), want, rtol=error, atol=0)
    assert (mean - x.double().mean((2, 3))).abs().max() <= 1e-7 * ratio


@every_layout
def test_equal_passes_give_equal_bits(layout):
    case = Case((2, 2, 30, 41), 1, layout=layout)
    first, second = (passes(case, True, False, True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@every_layout
@both_stages
def test_the_four_functions_have_the_relu_too(layout, estimate):
    case = Case((2, 6, 5, 7), 3, layout=layout)
    spec = Spec(3, 1e-5, True)
    plain = eager.Eager()
    moments = plain.moments(case.x)
    batch = Batch(case.mean, case.var.rsqrt(), None if estimate else 70)
    known = moments, batch, case.affine, spec
    results = []
    for kernels in (plain, KERNELS):
        y = kernels.normalize(case.x, *known)
        sums = kernels.backward_reduce(case.dy, case.x, *known)
        dx = kernels.backward_input(case.dy, case.x, sums, *known)
        results.append((y, dx, *sums.affine, *sums.along))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not results[1][0].lt(0).any() and results[1][0].eq(0).any()


@both_stages
@pytest.mark.parametrize('reentrant', [True, False])
def test_layers_and_activation_checkpointing(estimate, reentrant):
    results = []
    for name, wrap in (
        ('eager', lambda f, x: f(x)),
        ('triton', lambda f, x: f(x)),
        ('triton', lambda f, x: checkpoint(f, x, use_reentrant=reentrant)),
    ):
        torch.manual_seed(0)
        layer = BCN(8, 2, estimate=estimate, momentum=0.5)
        inputs = torch.randn(3, 2, 8, 4, 4, requires_grad=True)
        with using(name):
            sum(
                wrap(layer, x * (i + 1)).pow(3).sum() for i, x in enumerate(inputs)
            ).backward()
        grads = [p.grad for p in layer.parameters()]
        results.append((inputs.grad, *grads, *layer.buffers()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('offset', [0.0, 100.0])
@pytest.mark.parametrize(
    'shape', [(3, 2, 1, 1), (5, 3, 3, 3), (2, 256, 3, 3), (2, 5000), (4, 2, 3)]
)
def test_weights(shape, offset, dialect):
    weight = torch.randn(shape) + offset
    grad = torch.randn(shape)
    if len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    results = []
    for w, standardize in (
        (weight, standardize_weight),
        (weight.double(), reference.standardize),
    ):
        w = w.clone().requires_grad_()
        result = standardize(w, dialect=dialect)
        (back,) = torch.autograd.grad(result, w, grad.to(w.dtype))
        results.append((result, back))
    assert results[0][0].stride() == weight.stride()
    for got, want in zip(*results):
        assert (got.double() - want).abs().max() <= 2e-5 * max(1, want.abs().max())


@pytest.mark.parametrize('dialect', DIALECTS)
def test_filters_that_are_constant(dialect):
    weight = torch.full((2, 3, 3, 3), 0.7, requires_grad=True)
    result = standardize_weight(weight, dialect=dialect)
    result.backward(torch.randn_like(weight))
    assert result.abs().max() < 1e-2 and torch.isfinite(weight.grad).all()


@library.jit
def store_offsets(out, n, c, first, C, L, LAST: tl.constexpr):
    channel = c + tl.arange(0, 4).to(tl.int64)
    lane = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    at = _offsets(n.to(tl.int64), channel, first, C, L, LAST, 8)
    tl.store(out + lane, at)


@every_layout
def test_offsets_beyond_32_bits(layout):
    x = layout(torch.empty(1, 2, 2, 2))
    last = not x.is_contiguous()
    n, c, first, channels, length = 70_000, 3, 1 << 17, 256, 1 << 18
    out = torch.zeros(4, 8, dtype=torch.int64)
    store_offsets[(1,)](out, n, c, first, channels, length, last)
    position = torch.arange(8)[None] + first
    channel = torch.arange(4)[:, None] + c
    if last:
        want = (n * length + position) * channels + channel
    else:
        want = (n * channels + channel) * length + position
    assert torch.equal(out, want)


@pytest.mark.parametrize('dtype', DTYPES)
def test_agrees_with_the_plain_path(dtype):
    assert trial.disagreement(KERNELS, torch.device('cpu'), dtype) == ''


@pytest.mark.parametrize(
    'name, argument, what',
    [('apply', 2, 'y'), ('gradients', 4, 'the gradient of'), ('gradient', 2, 'dx')],
)
def test_a_wrong_kernel_is_found_out(monkeypatch, name, argument, what):
    kernel = getattr(triton._kernels(), f'{name}_kernel')

    class Wrong:
        def __getitem__(self, grid):
            def call(*args, **options):
                kernel[grid](*args, **options)
                args[argument].mul_(1.01)

            return call

    monkeypatch.setattr(triton._kernels(), f'{name}_kernel', Wrong())
    said = trial.disagreement(KERNELS, torch.device('cpu'), torch.float32)
    assert said.startswith('Triton() is wrong for torch.float32 on cpu: ' + what)
