"""Activation checkpointing: what is computed again moves no estimate."""

import copy
import gc
import random
import weakref

import pytest
import torch
from conftest import needs_torch
from support.layers import BATCH_STAGES, estimates, same
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN
from bcn_mm.ops import recomputation
from bcn_mm.ops._compat import TORCH

REENTRANT = pytest.mark.parametrize('reentrant', [True, False])


def forward_backward(layers, inputs, wrap):
    layers = copy.deepcopy(layers)
    outs = [wrap(layers, x) for x in inputs]
    loss = sum((y * (i + 1)).square().sum() for i, y in enumerate(outs))
    loss.backward()
    return [p.grad for p in layers.parameters()], list(layers.buffers())


@BATCH_STAGES
@REENTRANT
@pytest.mark.parametrize('calls', [1, 5])
def test_activation_checkpointing(estimate, reentrant, calls):
    """Recomputation moves nothing and sees the first pass's estimates.

    Five calls are a head shared by five pyramid levels of unlike statistics,
    every level a checkpoint of its own.
    """
    layers = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        BCN(8, 2, estimate=estimate, momentum=0.5),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        BCN(8, 4, estimate=estimate, momentum=0.5),
    ).double()
    inputs = [
        torch.randn(1, 4, 9 + i, 9, dtype=torch.double) * 2**i + i for i in range(calls)
    ]
    plain = forward_backward(layers, inputs, lambda f, x: f(x))
    inputs = [x.requires_grad_() for x in inputs]
    recomputed = forward_backward(
        layers,
        inputs,
        lambda f, x: checkpoint(f, x, use_reentrant=reentrant),
    )
    for want, got in zip(plain, recomputed):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Blocks(nn.Module):
    """Blocks that may be checkpointed, one in another, and called again."""

    def __init__(self, estimate, levels):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 4, 1),
                BCN(4, 2, estimate=estimate, momentum=0.5, num_levels=levels),
                nn.ReLU(inplace=True),
            )
            for _ in range(2)
        )

    def forward(self, xs, plan, wrap):
        """A plan is which block each call is of, and how it is nested."""

        def one(x, block, nested):
            module = self.blocks[block]
            inner = (lambda x: wrap(module, x)) if nested else module
            return wrap(lambda x: self.blocks[0](inner(x)), x)

        outs = (one(x, *call) for x, call in zip(xs, plan))
        return sum((i + 2) * y.pow(3).sum() for i, y in enumerate(outs))


def run_blocks(net, passes, wrap):
    """Gradients and estimates after each pass of a training."""
    net, results = copy.deepcopy(net), []
    for xs, plan, training, later in passes:
        net.zero_grad()
        loss = net.train(training)(xs, plan, wrap)
        # a layer may be called, and change its mode, before the backward pass
        if later:
            net.eval() if later == 'eval' else net(xs, plan, lambda f, x: f(x))
        loss.backward()
        gradients = (p.grad for p in net.parameters())
        results.append([g if g is None else g.clone() for g in gradients])
        results.append([b.clone() for b in net.buffers()])
    return results


@BATCH_STAGES
@REENTRANT
@pytest.mark.parametrize('seed', range(20))
def test_recomputation_sees_the_pass_that_it_repeats(estimate, reentrant, seed):
    """Whatever came before: equal inputs, passes without a finite mean, more
    than any number of calls, other layers, another mode, nesting."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    net = Blocks(estimate, draw.choice([1, 3])).double()
    pool = [torch.randn(2, 4, 3, 3).double() * 3 + i for i in range(2)]
    spoilt = pool[0].clone()
    spoilt[0, :, 0, 0] = float('nan')
    passes = [([spoilt], [(0, False)], True, None)]
    for _ in range(draw.randint(1, 4)):
        count = draw.choice([1, 2, 3, 20])
        passes.append(
            (
                [draw.choice(pool).clone() for _ in range(count)],
                [(draw.randint(0, 1), draw.random() < 0.5) for _ in range(count)],
                draw.random() < 0.5,
                draw.choice([None, 'eval', 'again']),
            )
        )
    for xs, *_ in passes:
        [x.requires_grad_() for x in xs]
    plain = run_blocks(net, passes, lambda f, x: f(x))
    recomputed = run_blocks(
        net, passes, lambda f, x: checkpoint(f, x, use_reentrant=reentrant)
    )
    torch.testing.assert_close(
        recomputed, plain, rtol=1e-12, atol=1e-12, equal_nan=True
    )


@REENTRANT
def test_backward_may_run_twice(reentrant):
    layer = BCN(4, 2, momentum=0.5).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    twin = copy.deepcopy(layer)
    gradients = []
    for net, wrap in (
        (twin, lambda f, x: f(x)),
        (layer, lambda f, x: checkpoint(f, x, use_reentrant=reentrant)),
    ):
        x.grad = None
        loss = wrap(net, x).pow(3).sum()
        loss.backward(retain_graph=True)
        net(x.detach() * 2)
        loss.backward()
        gradients.append(x.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert same(estimates(layer), estimates(twin))


@REENTRANT
def test_nothing_is_left_of_a_pass(reentrant):
    """No memory outlives the graph, or a move to another device."""
    layer = BCN(4, 2)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = recomputation.once

        def once(compute):
            value = original(compute)
            seen.append(weakref.ref(value[0]))  # of a pair, or a Batch
            return value

        patch.setattr(recomputation, 'once', once)
        for finish in (
            lambda y: y.sum().backward(),
            lambda y: None,
            lambda y: layer.to('meta').to_empty(device='cpu'),
        ):
            layer.reset_parameters()
            seen.clear()
            y = checkpoint(layer, x, use_reentrant=reentrant)
            assert all(ref() is not None for ref in seen)
            finish(y)
            del y
            gc.collect()
            assert seen and all(ref() is None for ref in seen)


@needs_torch(2, 6, 'checkpoints what is on the meta device')
def test_passes_on_several_devices():
    layer = BCN(4, 2)
    for device in ('cpu', 'meta', 'cpu'):
        layer.to_empty(device=device).reset_parameters()
        x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
        layer(x)
        checkpoint(layer, x, use_reentrant=True).sum().backward()
        assert x.grad.device.type == device


class Recompute(torch.autograd.Function):
    """Checkpointing as others write it, fairscale for one."""

    @staticmethod
    def forward(ctx, layer, x):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


@BATCH_STAGES
def test_recomputation_by_others(estimate):
    """Nothing moves twice, and one call a step is exact."""
    layer = BCN(4, 2, estimate=estimate, momentum=0.5).double()
    twin = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
        (want,) = torch.autograd.grad(twin(x).pow(3).sum(), x)
        with pytest.warns(UserWarning, match='torch.utils.checkpoint'):
            Recompute.apply(layer, x).pow(3).sum().backward()
        torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-12)
        assert same(estimates(layer), estimates(twin))
    x = x.detach().requires_grad_()
    y = Recompute.apply(BCN(4, num_levels=2), x.float())
    with pytest.raises(RuntimeError, match='num_levels'):
        y.sum().backward()


@pytest.mark.slow
@BATCH_STAGES
@REENTRANT
@pytest.mark.parametrize('calls', [1, 3])
def test_checkpointing_what_is_compiled(estimate, reentrant, calls):
    """Exact in every step; the other way around is refused, or exact."""
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        BCN(8, 2, momentum=0.5, estimate=estimate),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        BCN(8, momentum=0.5),
    ).double()
    compiled = copy.deepcopy(net)
    run = torch.compile(compiled)
    for _ in range(3):
        inputs = [torch.randn(2, 4, 9, 9).double() + i for i in range(calls)]
        inputs = [x.requires_grad_() for x in inputs]
        for model, wrap in (
            (net, lambda x: net(x)),
            (compiled, lambda x: checkpoint(run, x, use_reentrant=reentrant)),
        ):
            model.zero_grad()
            sum(wrap(x).pow(3).sum() for x in inputs).backward()
        for p, q in zip(net.parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(estimates(net), estimates(compiled))
    before = estimates(net), estimates(compiled)
    around = torch.compile(lambda x: checkpoint(compiled, x, use_reentrant=reentrant))
    try:
        around(inputs[0]).pow(3).sum().backward()
    except Exception as e:
        # an older torch refuses by itself, and less kindly
        assert TORCH < (2, 6) or 'checkpoint(torch.compile(block), x)' in str(e)
        assert same(before[1], estimates(compiled))
        return
    # with hooks for all modules, torch leaves what is checkpointed to Python
    net(inputs[0]).pow(3).sum().backward()
    for p, q in zip(net.parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(estimates(net), estimates(compiled))
