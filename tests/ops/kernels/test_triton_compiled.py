"""The Triton kernels as machine code, which needs no card."""

import pytest
import torch

from bcn_mm.ops.estimates import Rule, Running
from bcn_mm.ops.stages import Affine, Batch, Spec

pytest.importorskip('triton', minversion='3', reason='needs Triton 3 and its assembler')

from bcn_mm.ops.kernels import triton_report

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('card', triton_report.CARDS)
@pytest.mark.parametrize('name', triton_report.INPUTS)
def test_nothing_is_spilled(name, card):
    found = list(triton_report.rows((name,), (card,)))
    assert len(found) == 6
    for _, kernel, (registers, spills, shared) in found:
        assert not spills, kernel
        # two blocks of 256 threads, or four of 128, at the least
        assert registers <= 128, kernel
        assert shared <= 16 << 10, kernel


SPEC = Spec(2, 1e-5, True)
OPERANDS = dict(device='meta')


def running(dtype=torch.float32):
    mean, var = torch.empty(2, 8, dtype=dtype, **OPERANDS)
    return Running(mean, var, torch.empty((), dtype=torch.int64, **OPERANDS))


def evaluation(passes, x, affine):
    rule = Rule(False, True, None, 'identity', 1e-5)
    passes.forward(x, running(), rule, affine, SPEC)


def repetition(passes, x, affine):
    batch = torch.empty(2, 8, dtype=torch.float64, **OPERANDS)
    for repeats in (False, True):
        rule = Rule(True, False, 0.1, 'first', 1e-5)
        passes.forward(x, running(), rule, affine, SPEC, batch, repeats)


def other_estimates(passes, x, affine):
    rule = Rule(True, True, 0.1, 'identity', 1e-5)
    for dtype in (torch.float16, torch.float64):
        passes.forward(x, running(dtype), rule, affine, SPEC)
    mean, var, _ = running()
    passes.forward(x, Running(mean, var, None), rule, affine, SPEC)


def nothing_learned(passes, x, affine):
    rule = Rule(True, True, 0.1, 'identity', 1e-5)
    nothing, spec = Affine(None, None, None, None), SPEC._replace(relu=False)
    _, saved = passes.forward(x, running(), rule, nothing, spec)
    passes.backward(x, x, saved, nothing, rule, spec, True)


def parameters_alone(passes, x, affine):
    rule = Rule(True, True, 0.1, 'identity', 1e-5)
    _, saved = passes.forward(x, running(), rule, affine, SPEC)
    passes.backward(x, x, saved, affine, rule, SPEC, False)


def four_functions(passes, x, affine):
    moments = passes.moments(x)
    batch = Batch(affine.batch_weight, affine.batch_bias, 30)
    for spec in (SPEC, SPEC._replace(relu=False)):
        known = moments, batch, affine, spec
        passes.normalize(x, *known)
        sums = passes.backward_reduce(x, x, *known)
        passes.backward_input(x, x, sums, *known)


def weights(passes, x, affine):
    weight = torch.empty(64, 256, 3, 3, **OPERANDS)
    for under_root in (False, True):
        _, saved = passes.standardize(weight, 1e-5, True, under_root)
    passes.standardize_backward(weight, weight, saved, True, under_root)


@pytest.mark.parametrize(
    'call',
    [
        weights,
        evaluation,
        repetition,
        other_estimates,
        nothing_learned,
        parameters_alone,
        four_functions,
    ],
)
def test_all_else_compiles_too(call):
    channels, groups = torch.empty(8, **OPERANDS), torch.empty(2, **OPERANDS)
    affine = Affine(channels, channels, groups, groups)
    x = torch.empty(3, 8, 5, 7, **OPERANDS)
    found = triton_report.recorded(lambda passes: call(passes, x, affine))
    assert len(found) > 2
    for launch in found:
        assert not triton_report.compiled(launch, 80).spills


def test_the_report(capsys, monkeypatch):
    words = ['triton_report', '--cards', '80', '--inputs', 'pooled']
    monkeypatch.setattr('sys.argv', words)
    triton_report.main()
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == '| input | kernel | sm_80 |' and len(lines) == 6
    assert all(line.startswith('| pooled | `') for line in lines)
