"""BCN where torch compiles, records, transforms or only pretends to compute."""

import copy

import pytest
import torch
from conftest import EXPORT, needs_torch
from support.layers import BATCH_STAGES, estimates, randomize, same
from torch import nn

from bcn_mm import BCN, WSConv2d


@BATCH_STAGES
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


@needs_torch(2, 6, 'compiles autograd functions as a whole')
@pytest.mark.slow
@BATCH_STAGES
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
@BATCH_STAGES
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
@BATCH_STAGES
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


@BATCH_STAGES
@pytest.mark.parametrize('how', ['trace', pytest.param('export', marks=EXPORT)])
def test_a_training_pass_is_not_recorded(estimate, how):
    layer, x = BCN(4, estimate=estimate), torch.randn(2, 4, 3, 3)
    before = estimates(layer)
    with pytest.raises(RuntimeError, match=r'model.eval\(\) first'):
        if how == 'trace':
            torch.jit.trace(layer, x)
        else:
            torch.export.export(layer, (x,), strict=False)
    assert same(before, estimates(layer))


@BATCH_STAGES
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


@BATCH_STAGES
@pytest.mark.parametrize('training', [True, False])
def test_both_modes_of_differentiation_agree(estimate, training):
    """<u, J v> is the same from either side; estimates are constants to both."""
    layer = randomize(BCN(8, 2, momentum=0.5, estimate=estimate).double())
    layer.train(training)
    x, u, v = torch.randn(3, 2, 8, 4, 4, dtype=torch.double)

    def norm(x):
        state = {k: t.detach().clone() for k, t in layer.state_dict().items()}
        return torch.func.functional_call(layer, state, (x,))

    _, along = torch.func.jvp(norm, (x,), (v,))
    _, pull = torch.func.vjp(norm, x)
    torch.testing.assert_close((along * u).sum(), (pull(u)[0] * v).sum())
