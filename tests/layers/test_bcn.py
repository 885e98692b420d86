"""BCN as a module: the edges, and what OpenMMLab's tools make of it."""

import copy
import gc
import logging
import pickle
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import build_norm_layer, is_norm
from mmdet.registry import MODELS as MMDET
from mmengine.model import constant_init, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from mmseg.registry import MODELS as MMSEG
from support import reference
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN, WSConv2d
from bcn_mm.ops import batch_channel_norm, recomputation

MODES = pytest.mark.parametrize('estimate', [True, False])
NORM = dict(type='BCN')


def estimates(layer):
    return {k: v.clone() for k, v in layer.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def randomize(layer):
    """Move every parameter and estimate away from its start."""
    with torch.no_grad():
        for name, p in layer.state_dict().items():
            if p.is_floating_point():
                p.copy_(
                    torch.rand_like(p) + 0.5 if 'var' in name else torch.randn_like(p)
                )
            else:
                p.fill_(7)
    return layer


def resnet(depth=18, **kwargs):
    return MMDET.build(
        dict(
            type='mmdet.ResNet',
            depth=depth,
            base_channels=8,
            norm_cfg=NORM,
            **kwargs,
        )
    )


# -- the layer ---------------------------------------------------------------


@MODES
def test_layer_is_the_op_with_its_state(estimate):
    layer = randomize(BCN(6, 2, momentum=0.3, estimate=estimate).double())
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for training in (True, True, False):
        layer.train(training)
        x = torch.randn(2, 6, 4, 4, dtype=torch.double)
        want, mean, var = reference.bcn(
            x,
            2,
            mean,
            var,
            layer.batch_weight,
            layer.batch_bias,
            layer.weight,
            layer.bias,
            training,
            estimate,
            0.3,
        )
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 7 + 2


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    n=st.integers(1, 3),
    channels=st.integers(1, 70),
)
def test_any_channel_count_and_dimension(shape, n, channels):
    layer = BCN(channels)
    x = torch.randn(n, channels, *shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@MODES
def test_one_sample_one_position(estimate):
    """DeepLab's image pooling at one image per step."""
    layer = BCN(256, estimate=estimate)
    x = torch.randn(1, 256, 1, 1, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_one_value_per_channel_is_exact():
    """Nothing to normalize: batch statistics leave the bias, to the bit."""
    layer = BCN(64, num_groups=16, estimate=False)
    y = layer(torch.randn(1, 64, 1, 1) * 100)
    assert torch.equal(y, torch.zeros_like(y))


@MODES
@pytest.mark.parametrize('shape', [(0, 8, 7, 7), (2, 8, 0, 4), (0, 8)])
@pytest.mark.parametrize('dtype', [torch.float, torch.half])
def test_empty_input(estimate, shape, dtype):
    """A mask head without a positive RoI."""
    layer = randomize(BCN(8, 2, estimate=estimate))
    before = estimates(layer)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    for p in layer.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    assert same(before, estimates(layer))


@MODES
@given(
    n=st.integers(1, 3),
    size=st.integers(1, 5),
    offset=st.sampled_from([0.0, 30.0]),
    bad=st.sampled_from([float('nan'), float('inf'), -float('inf')]),
    seed=st.integers(0, 999),
)
def test_overflow_leaves_the_last_finite_estimates(
    estimate, n, size, offset, bad, seed
):
    """...of its own channel, while all others move as ever."""
    torch.manual_seed(seed)
    layer = randomize(BCN(8, 2, estimate=estimate))
    x = torch.randn(n, 8, size, size) + offset
    layer(x)
    before, healthy = estimates(layer), copy.deepcopy(layer)
    spoilt = x.clone()
    spoilt[-1, 3, -1, -1] = bad
    want, got = healthy(x), layer(spoilt)
    after, normal = estimates(layer), estimates(healthy)
    others = torch.arange(8) != 3
    for name in ('running_mean', 'running_var'):
        assert after[name][3] == before[name][3]
        assert torch.equal(after[name][others], normal[name][others])
    assert torch.equal(got[:, 4:], want[:, 4:])  # the other group
    assert not estimate or torch.isfinite(got[:-1]).all()
    layer(x)
    assert layer.running_mean[3] != before['running_mean'][3]


def test_overflow_of_float16_buffers():
    layer = BCN(4, 2, momentum=1.0).half()
    layer(torch.full((1, 4, 2, 2), 1e3).half().mul_(torch.randn(4, 1, 1)))
    assert torch.isfinite(layer.running_var).all()


@MODES
def test_no_host_synchronisation(estimate):
    """On a device, nothing in a step depends on a value of a tensor.

    Fake tensors have a device and no values: reading one raises.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = BCN(8, 2, estimate=estimate, device='meta')
        x = torch.randn(2, 8, 4, 4, device='meta', requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.slow
@MODES
def test_compiles_without_a_graph_break(estimate):
    net = nn.Sequential(
        WSConv2d(4, 8, 3), BCN(8, 2, estimate=estimate), nn.ReLU(inplace=True)
    )
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True)
    for training in (True, True, False):
        net.train(training)
        twin.train(training)
        x = torch.randn(2, 4, 9, 9)
        got, want = compiled(x), twin(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        got.square().sum().backward()
        want.square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(estimates(net), estimates(twin))


@pytest.mark.slow
@MODES
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_compiles_for_pictures_of_every_size(estimate, dtype):
    """Detectors see another one in every step."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), BCN(8, estimate=estimate), nn.Conv2d(8, 4, 3)
    )
    twin = copy.deepcopy(net)
    compiled = torch.compile(net)
    for step in range(10):
        x = torch.randn(2, 3, 32 + 7 * step % 29, 40 + 16 * step % 43)
        losses = []
        for model in (compiled, twin):
            model.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, dtype != x.dtype):
                losses.append(model(x).float().square().mean())
            losses[-1].backward()
        tight = dict(rtol=1e-4, atol=1e-4)
        if dtype != x.dtype:
            tight = dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(*losses, **tight)
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad, **tight)
        torch.testing.assert_close(estimates(net), estimates(twin), **tight)


@pytest.mark.slow
@MODES
def test_compiled_sums_of_float16_do_not_overflow(estimate):
    layer = BCN(8, 2, estimate=estimate)
    compiled = torch.compile(copy.deepcopy(layer))
    x = (torch.randn(1, 8, 160, 160) + 20).half()
    results = []
    for net in (layer, compiled):
        leaf = x.clone().requires_grad_()
        net(leaf).backward(torch.full_like(x, 3))  # 76,800 in each channel
        sums = [p.grad / x[0, 0].numel() for p in net.parameters()]
        results.append([leaf.grad, *sums])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


@MODES
def test_in_place_activation(estimate):
    """mmdet's ReLU works in place, which autograd allows on no view."""
    layer = BCN(8, 2, estimate=estimate).eval()
    for n in (1, 2):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, 8, 4, 4).contiguous(memory_format=layout)
            grads = []
            for inplace in (True, False):
                leaf = x.clone().requires_grad_()
                nn.ReLU(inplace)(layer(leaf)).square().sum().backward()
                grads.append(leaf.grad)
            assert torch.equal(*grads)


@MODES
@pytest.mark.parametrize('n', [1, 2])
def test_channels_last(estimate, n):
    last = torch.channels_last
    layer = BCN(8, 2, estimate=estimate)
    x = torch.randn(n, 8, 4, 5).contiguous(memory_format=last)
    leaf = x.requires_grad_()
    y = layer(leaf)
    assert y.is_contiguous(memory_format=last)
    y.square().sum().backward()
    assert leaf.grad.is_contiguous(memory_format=last)


@MODES
def test_evaluation_moves_nothing(estimate):
    layer = randomize(BCN(8, 2, estimate=estimate)).eval()
    before = estimates(layer)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(layer(x), layer(x))
    assert same(before, estimates(layer))


def test_training_pass_between_forward_and_backward_of_another():
    """Estimates are constants of the pass that used them."""
    layer = BCN(8, 2, momentum=0.9)
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    want = torch.autograd.grad(copy.deepcopy(layer)(x).square().sum(), x)
    y = layer(x)
    layer(torch.randn(1, 8, 4, 4) * 9)
    got = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got[0], want[0])
    layer.eval()
    y = layer(x)
    layer.train()(torch.randn(1, 8, 4, 4) * 9)
    torch.autograd.grad(y.sum(), x)


# -- activation checkpointing ------------------------------------------------


def forward_backward(layers, inputs, wrap):
    layers = copy.deepcopy(layers)
    outs = [wrap(layers, x) for x in inputs]
    loss = sum((y * (i + 1)).square().sum() for i, y in enumerate(outs))
    loss.backward()
    return [p.grad for p in layers.parameters()], list(layers.buffers())


@MODES
@pytest.mark.parametrize('reentrant', [True, False])
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


REENTRANT = pytest.mark.parametrize('reentrant', [True, False])


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


@MODES
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
            seen.append(weakref.ref(value.mean))
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


@MODES
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
@MODES
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
        assert 'checkpoint(torch.compile(block), x)' in str(e)
        assert same(before[1], estimates(compiled))
        return
    # with hooks for all modules, torch leaves what is checkpointed to Python
    net(inputs[0]).pow(3).sum().backward()
    for p, q in zip(net.parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(estimates(net), estimates(compiled))


@pytest.mark.parametrize('estimate', [True, False])
def test_with_cp_of_a_backbone(estimate):
    """mmdet's own ``with_cp=True``."""
    states = []
    for with_cp in (False, True):
        torch.manual_seed(1)
        net = MMDET.build(
            dict(
                type='mmdet.ResNet',
                depth=18,
                base_channels=8,
                norm_cfg=dict(NORM, estimate=estimate),
                with_cp=with_cp,
                norm_eval=False,
            )
        )
        net.double().train()
        x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
        sum(y.square().sum() for y in net(x)).backward()
        states.append(
            (
                estimates(net),
                {n: p.grad for n, p in net.named_parameters() if p.grad is not None},
            )
        )
    torch.testing.assert_close(*states)


def test_copies_and_pickles():
    layer = BCN(4, 2)
    layer(torch.randn(1, 4, 2, 2))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same(estimates(twin), estimates(layer))


@pytest.mark.parametrize('start', ['identity', 'first', 'average'])
def test_starts(start):
    """A new layer's estimates after one pass; a checkpoint's move on."""
    x = torch.randn(2, 4, 5, 5) * 2 + 3
    layer = BCN(4, 2, start=start)
    layer(x)
    if start == 'identity':
        assert torch.allclose(layer.running_mean, 0.01 * x.mean((0, 2, 3)))
    else:
        assert torch.allclose(layer.running_mean, x.mean((0, 2, 3)))
        assert torch.allclose(
            layer.running_var, x.var((0, 2, 3), correction=0), rtol=1e-4
        )
    other = nn.BatchNorm2d(4)
    other.running_mean.fill_(5.0)
    for state in (other.state_dict(), dict(other.state_dict())):
        if type(state) is dict:  # as old checkpoints are
            del state['num_batches_tracked']
        layer = BCN(4, 2, start=start)
        layer.load_state_dict(state)
        layer(x)
        moved = 5 + 0.01 * (x.mean((0, 2, 3)) - 5)
        assert torch.allclose(layer.running_mean, moved)


# -- a norm layer to every tool that asks ------------------------------------


def test_construction_errors_and_warnings():
    with pytest.raises(ValueError, match='num_groups=32.*48'):
        BCN(48, num_groups=32)
    with pytest.warns(UserWarning, match='InstanceNorm'):
        BCN(8, num_groups=8)
    for bad in (
        dict(momentum=1.5),
        dict(eps=0),
        dict(num_features=0),
        dict(start='now'),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BCN(**{'num_features': 8, **bad})
    for groups in (2.0, '2', None, [2]):
        with pytest.raises(TypeError, match='num_groups must be an integer'):
            batch_channel_norm(torch.zeros(1, 8), groups, torch.zeros(8), torch.ones(8))
    with pytest.raises(TypeError, match='num_groups must be an integer.*2.0'):
        BCN(8, 2.0)
    assert BCN(8, np.int64(2))(torch.zeros(1, 8)).shape == (1, 8)
    with pytest.raises(TypeError, match='momentun'):
        build_norm_layer(dict(type='BCN', momentun=0.1), 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        BCN(1)
        BCN(64)


@pytest.mark.parametrize(
    'dtype', [torch.uint8, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize('training', [True, False])
def test_input_that_is_not_floating(dtype, training):
    layer = BCN(4).train(training)
    before = estimates(layer)
    with pytest.raises(TypeError, match=f'floating.*{dtype}'):
        layer(torch.ones(1, 4, 2, 2, dtype=dtype))
    assert same(before, estimates(layer))


def test_input_by_the_name_that_torch_has_for_it():
    layer, x = BCN(4), torch.randn(1, 4, 2, 2)
    assert torch.equal(copy.deepcopy(layer)(input=x), layer(x))


@MODES
def test_a_training_pass_is_not_recorded(estimate):
    layer, x = BCN(4, estimate=estimate), torch.randn(2, 4, 3, 3)
    before = estimates(layer)
    for record in (
        lambda: torch.jit.trace(layer, x),
        lambda: torch.export.export(layer, (x,), strict=False),
    ):
        with pytest.raises(RuntimeError, match=r'model.eval\(\) first'):
            record()
    assert same(before, estimates(layer))


@MODES
@pytest.mark.parametrize('training', [True, False])
def test_torch_func(estimate, training):
    """Gradients by transformation are those of autograd."""
    layer = randomize(BCN(6, 2, estimate=estimate)).train(training).double()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 6, 4, 4, dtype=torch.double)

    def loss(parameters, buffers, x):
        state = {**parameters, **buffers}
        return torch.func.functional_call(layer, state, x).pow(3).sum()

    buffers = {k: v.clone() for k, v in layer.named_buffers()}
    got = torch.func.grad(loss, (0, 2))(dict(layer.named_parameters()), buffers, x)
    leaf = x.clone().requires_grad_()
    twin(leaf).pow(3).sum().backward()
    torch.testing.assert_close(got[1], leaf.grad)
    want = {k: p.grad for k, p in twin.named_parameters()}
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(buffers, estimates(twin))
    if not training:
        one = torch.func.vmap(lambda x: layer(x[None])[0])(x)
        torch.testing.assert_close(one, twin(x))


def test_defaults():
    layer = BCN(256)
    assert layer.num_groups == 32 and layer.eps == 1e-5
    assert layer.num_features == layer.num_channels == 256
    shapes = {k: tuple(v.shape) for k, v in layer.state_dict().items()}
    assert shapes == dict(
        weight=(32,),
        bias=(32,),
        batch_weight=(256,),
        batch_bias=(256,),
        running_mean=(256,),
        running_var=(256,),
        num_batches_tracked=(),
    )
    assert '256, num_groups=32' in repr(layer)
    assert not list(BCN(8, affine=False).parameters())
    BCN(8, affine=False)(torch.randn(1, 8, 2, 2))


@pytest.mark.parametrize('scope', [MODELS, MMDET, MMSEG])
def test_registered_for_every_scope(scope):
    with scope.switch_scope_and_registry(None):
        name, layer = build_norm_layer(dict(NORM, requires_grad=False), 64, 1)
    assert name == 'bn1' and type(layer) is BCN and is_norm(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    assert scope.build(dict(type='BCN', num_features=8)).num_groups == 4


def test_no_batch_norm_to_norm_eval_and_to_sync_bn():
    """A stock config has norm_eval=True; estimates must move all the same."""
    net = resnet(frozen_stages=1)
    before = {n: estimates(m) for n, m in net.named_modules() if isinstance(m, BCN)}
    net.train()
    assert net.norm_eval
    net(torch.randn(1, 3, 64, 64))
    for name, module in net.named_modules():
        if isinstance(module, BCN):
            frozen = name == 'bn1' or name.startswith('layer1')
            assert same(before[name], estimates(module)) == frozen, name
    assert revert_sync_batchnorm(net) is net


def test_weight_decay_multiplier_reaches_all_four():
    net = nn.Sequential(WSConv2d(3, 8, 3, bias=False), BCN(8))
    wrapper = build_optim_wrapper(
        net,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.1, weight_decay=0.5),
            paramwise_cfg=dict(norm_decay_mult=0.0),
        ),
    )
    decay = {
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    assert decay[id(net[0].weight)] == 0.5
    assert [decay[id(p)] for p in net[1].parameters()] == [0.0] * 4


def test_init_cfg_by_layer_type_and_zero_init_residual():
    net = resnet(
        depth=50,
        zero_init_residual=True,
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=0.5, bias=0.25, layer='GroupNorm'),
        ],
    )
    net.init_weights()
    assert (net.bn1.weight == 0.5).all() and (net.bn1.bias == 0.25).all()
    net = resnet(depth=50, zero_init_residual=True)
    net.init_weights()
    assert (net.layer1[0].norm3.weight == 0).all()
    assert (net.layer1[0].norm3.batch_weight == 1).all()
    # so a residual branch starts at zero and its scale learns
    block = net.layer2[1].train()
    x = torch.rand(1, 64, 8, 8)
    y = block(x)
    torch.testing.assert_close(y, x)
    y.square().sum().backward()
    grad = block.norm3.weight.grad
    assert torch.isfinite(grad).all() and grad.abs().max() > 0


# -- state dicts -------------------------------------------------------------


class Records(logging.Handler):
    """The lines that mmengine logs about BCN."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if 'BCN' in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def log():
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('test_bcn')
    MMLogger.get_current_instance()
    records = Records()
    MMLogger.get_current_instance().addHandler(records)
    yield records.lines
    for instance in (logger, MMLogger.get_current_instance()):
        instance.removeHandler(records)


@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_batch_norm_state_fills_the_batch_stage(loader, log):
    torch.manual_seed(3)
    bn = MMDET.build(dict(type='mmdet.ResNet', depth=18, base_channels=8))
    for m in bn.modules():
        if isinstance(m, nn.BatchNorm2d):
            randomize(m)
            m.num_batches_tracked.fill_(7)
    net = randomize(resnet())
    state = bn.state_dict()
    keys = list(state)
    for _ in range(2):
        log.clear()
        if loader == 'torch':
            result = net.load_state_dict(state)
            assert not result.missing_keys + result.unexpected_keys
        else:
            load_state_dict(net, state, strict=True)
        assert len(log) == 1 and 'BatchNorm' in log[0]
    assert list(state) == keys
    ours, theirs = net.layer2[0].bn2, bn.layer2[0].bn2
    assert torch.equal(ours.batch_weight, theirs.weight)
    assert torch.equal(ours.batch_bias, theirs.bias)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 7


def test_batch_norm_state_is_kept_by_a_channel_stage_in_the_mean():
    """Exactly where a sample has the statistics of what was trained on."""
    torch.manual_seed(5)
    groups, count = 4, 4096
    bn = randomize(nn.BatchNorm2d(32).double()).eval()
    with torch.no_grad():
        bn.weight[:8] = 0  # a group that BatchNorm has switched off
    layer = BCN(32, groups).double().eval()
    layer.load_state_dict(bn.state_dict())
    x = torch.randn(1, 32, count, 1, dtype=torch.double)
    var, mean = torch.var_mean(x, 2, unbiased=False, keepdim=True)
    x = (x - mean) / var.sqrt()  # mean 0 and variance 1, exactly
    x = x * (bn.running_var + bn.eps).sqrt().view(32, 1, 1)
    x = x + bn.running_mean.view(32, 1, 1)
    torch.testing.assert_close(layer(x), bn(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('inner', ['bn', 'pbn'])
@pytest.mark.parametrize('tracked', [True, False])
def test_authors_state(inner, tracked, log):
    layer, source = randomize(BCN(64)), randomize(BCN(64))
    state = {
        'n.weight': source.weight.view(1, 32, 1),
        'n.bias': source.bias.view(1, 32, 1),
        f'n.{inner}.weight': source.batch_weight,
        f'n.{inner}.bias': source.batch_bias,
        f'n.{inner}.running_mean': source.running_mean,
        f'n.{inner}.running_var': source.running_var,
    }
    if tracked:
        state[f'n.{inner}.num_batches_tracked'] = torch.tensor(7)
        state[f'n.{inner}.estbn_moving_speed'] = torch.zeros(1)
    else:  # as old as the default momentum's memory
        source.num_batches_tracked.fill_(100)
    nn.ModuleDict(dict(n=layer)).load_state_dict(state)
    assert same(layer.state_dict(), source.state_dict())
    assert len(log) == 1 and "authors'" in log[0]


def test_own_state_round_trip(log):
    source, layer = randomize(BCN(64)), BCN(64)
    layer.load_state_dict(source.state_dict())
    assert same(layer.state_dict(), source.state_dict()) and not log


@pytest.mark.parametrize(
    'source, message',
    [
        (nn.GroupNorm(32, 64, affine=False), 'running_mean'),
        (nn.GroupNorm(32, 32), r'Missing.*batch_weight'),
        (nn.LayerNorm([64, 2]), r'size mismatch for weight'),
        (nn.BatchNorm2d(32), r'size mismatch for batch_weight'),
        (BCN(64, num_groups=16), r'size mismatch for weight'),
    ],
)
def test_anything_else_is_a_mismatch(source, message):
    with pytest.raises(RuntimeError, match=message):
        BCN(64).load_state_dict(source.state_dict())


@pytest.mark.parametrize('source', [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
@pytest.mark.parametrize('levels', [1, 3])
def test_a_foreign_state_that_is_assigned(source, levels):
    """All of a layer ends on the state's device, in memory of its own."""
    state = source(8).to('meta').state_dict()
    state.pop('num_batches_tracked', None)
    layer = BCN(8, num_levels=levels)
    layer.load_state_dict(state, assign=True)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {t.device.type for t in tensors} == {'meta'}
    state = {k: torch.ones_like(t, device='cpu') for k, t in state.items()}
    layer = BCN(8, num_levels=levels)
    layer.load_state_dict(state, assign=True)
    before = layer.running_mean.view(levels, 8).clone()
    layer(torch.randn(2, 8, 4, 4) + 5)  # moves the first level alone
    moved = layer.running_mean.view(levels, 8) != before
    assert moved.any(1).sum() == 1


def test_leftovers_of_a_known_layout_are_reported():
    state = nn.BatchNorm2d(64).state_dict()
    with pytest.raises(RuntimeError, match='Unexpected.*surprise'):
        BCN(64).load_state_dict({**state, 'surprise': torch.zeros(1)})


def test_pretrained_init_cfg(tmp_path):
    """``init_cfg=dict(type='Pretrained')`` from a BatchNorm file."""
    bn = MMDET.build(dict(type='mmdet.ResNet', depth=18, base_channels=8))
    path = tmp_path / 'bn.pth'
    torch.save(get_state_dict(bn), path)
    net = resnet(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    assert torch.equal(net.conv1.weight, bn.conv1.weight)
    load_checkpoint(net, str(path), strict=True)


def test_constant_init_leaves_the_batch_stage():
    layer = BCN(8)
    constant_init(layer, 0, bias=0)
    assert (layer.weight == 0).all() and (layer.batch_weight == 1).all()
