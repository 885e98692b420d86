"""Levels in what is compiled, traced or exported."""

import copy

import pytest
import torch
from conftest import EXPORT, needs_torch
from support.levels import (
    SIZES,
    Head,
    pyramid,
    separate,
    shared,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm.deploy import fold
from bcn_mm.layers import levels

ONE_GRAPH = needs_torch(2, 6, 'its compiler knows what a thread has')


@pytest.fixture(autouse=True)
def _compiler():
    torch._dynamo.reset()  # which counts what a process has compiled


@ONE_GRAPH
def test_compiles_as_it_runs():
    layer, steps = shared(), [pyramid() for _ in range(3)]
    compiled = copy.deepcopy(layer)
    run = torch.compile(
        lambda x: [compiled(t) for t in x], fullgraph=True, backend='aot_eager'
    )
    for x in steps:
        torch.testing.assert_close(run(x), [layer(t) for t in x])
    torch.testing.assert_close(list(compiled.buffers()), list(layer.buffers()))


@ONE_GRAPH
@pytest.mark.parametrize('compile', ['function', 'method'])
def test_compiled_passes_begin_too(compile):
    layer = shared()
    layers = separate(layer)
    net = Head(layer)
    if compile == 'function':
        net = torch.compile(net, fullgraph=True, backend='aot_eager')
    else:
        net.compile(fullgraph=True, backend='aot_eager')
    for sizes in (SIZES, (4,), (4,), (4, 2), SIZES):
        x = pyramid(sizes)
        want = [one(t) for one, t in zip(layers, x)]
        torch.testing.assert_close(net(x), want)
    got = [getattr(layer, name) for name in ('running_mean', 'running_var')]
    for value, name in zip(got, ('running_mean', 'running_var')):
        want = torch.stack([getattr(one, name) for one in layers])
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize(
    'how', ['trace', pytest.param('export', marks=EXPORT), 'fold and trace']
)
@pytest.mark.parametrize('left_over', [False, True])
def test_recorded_with_fewer_levels(how, left_over):
    layer = shared()
    with torch.no_grad():
        layer.running_mean.copy_(torch.randn(5, 6))
    head = Head(layer).eval()
    x = pyramid((8, 4, 2))
    want = head(x)
    if left_over:
        layer(x[0]), head(x[:2])
    if how == 'export':
        recorded = torch.export.export(head, (x,)).module()
    else:
        net = fold(head, x) if how == 'fold and trace' else head
        recorded = torch.jit.trace(net, (x,), check_trace=False)
    for _ in range(2):
        torch.testing.assert_close(list(recorded(x)), want)
    torch.testing.assert_close(head(x), want, rtol=0, atol=0)


@pytest.mark.parametrize('how', ['export', 'trace', 'compile', 'call'])
def test_a_pass_that_cannot_be_recorded_is_over(how):
    layer = shared()
    layers = separate(layer)
    head = Head(layer)
    (x,) = pyramid((4,))
    record = dict(
        export=lambda: torch.export.export(head, ([x, None],), strict=False),
        trace=lambda: torch.jit.trace(head, ([x],)),
        compile=lambda: torch.compile(head, fullgraph=True)([x, None]),
        call=lambda: head([x, None]),
    )
    with pytest.raises(Exception):  # noqa: B017  each its own
        record[how]()
    if how == 'call':  # the first level has moved
        layers[0](x)
    for _ in range(2):
        torch.testing.assert_close(head([x])[0], layers[0](x))


def test_a_pass_that_compiled_code_left_behind_is_over():
    layer = shared()
    layers = separate(layer)
    head = Head(layer)
    levels._thread.current.begin(None)  # as it does
    for _ in range(2):
        (x,) = pyramid((4,))
        torch.testing.assert_close(head([x])[0], layers[0](x))


@pytest.mark.parametrize('where', ['before', 'within', 'after'])
@pytest.mark.parametrize(
    'checkpointed',
    [
        False,
        pytest.param(
            True, marks=needs_torch(2, 6, 'compiles the checkpoint of a module')
        ),
    ],
)
def test_a_graph_break_leaves_no_pass_behind(where, checkpointed):
    """...whichever part of a pass is compiled, and which is not."""
    layer = shared()
    layers = separate(layer)

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head(layer)

        def forward(self, x):
            if where == 'before':
                torch._dynamo.graph_break()
            if where == 'within':
                x = [*x[:1], torch.compiler.disable(nn.Identity())(x[1]), x[2]]
            if checkpointed:
                outs = checkpoint(self.head, x, use_reentrant=False)
            else:
                outs = self.head(x)
            if where == 'after':
                torch._dynamo.graph_break()
            return [y + 0 for y in outs]

    net = torch.compile(Broken(), backend='aot_eager')
    for sizes in ((8, 4, 2), (4, 4, 4)):
        x = pyramid(sizes)
        want = [one(t) for one, t in zip(layers, x)]
        torch.testing.assert_close(net(x), want)
    for sizes in ((4,), (4,)):
        (x,) = pyramid(sizes)
        torch.testing.assert_close(Head(layer)([x])[0], layers[0](x))
