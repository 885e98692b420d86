"""What a device other than the CPU is asked to do.

``using('eager')`` has the CPU take the route of all other devices.
Here that route has to give the CPU's numbers, by ordinary operators alone:
those in ``ORDINARY``, which torch documents and implements for every device
and dtype in use, called as anybody calls them.
"""

import copy
import operator
import uuid

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.model import BaseModel
from mmengine.runner import Runner
from support.ranks import on_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from bcn_mm import (
    BCN,
    EliminationSingularityHook,
    SyncBCN,
    SyncEstimatesHook,
    WSConv2d,
)
from bcn_mm.ops import DIALECTS
from bcn_mm.ops.kernels import using

ORDINARY = {
    # elementwise
    *('add', 'add_', 'sub', 'sub_', 'mul', 'mul_', 'div', 'div_', 'neg_'),
    'pow_',
    *('addcmul', 'addcmul_', 'lerp_', 'pow', 'square_', 'sqrt', 'rsqrt'),
    *('rsqrt_', 'reciprocal', 'abs', 'round', 'clamp_min', 'clamp_min_'),
    *('lt', 'gt', 'eq', 'where', 'masked_fill', 'fill_', 'zero_'),
    # reductions
    *('sum', 'mean', 'var_mean', 'var', 'any'),
    # memory
    *('clone', 'copy_', '_to_copy', 'empty', 'empty_like', 'new_empty'),
    'new_empty_strided',
    'is_same_size',  # asked by autograd itself, before torch 2.6
    *('zeros', 'zeros_like', 'new_zeros', 'ones_like', 'cat', 'stack'),
    *('view', 'unsqueeze', 'squeeze', 'select', 'slice', 'split'),
    *('split_with_sizes', 'unbind', 'expand', 'detach'),
    # of the networks around
    *('convolution', 'convolution_backward', 'relu', 'relu_'),
    *('threshold_backward', 'allreduce_'),
}


class Operators(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def both_routes(call, module):
    """What ``call(a copy of module)`` returns by either route, of which it
    checks the general one."""
    results = []
    for choice in ('auto', 'eager'):
        copied = copy.deepcopy(module)
        with using(choice), Operators() as seen:
            results.append(call(copied))
    assert seen.names <= ORDINARY, sorted(seen.names - ORDINARY)
    return results


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 3),
    depth=st.integers(1, 4),
    spatial=st.lists(st.integers(0, 5), max_size=3),
    last=st.booleans(),
    dtype=st.sampled_from(
        [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    ),
    estimate=st.booleans(),
    start=st.sampled_from(['identity', 'first', 'average']),
    momentum=st.sampled_from([0.1, None]),
    affines=st.booleans(),
    offset=st.sampled_from([0.0, 10.0]),
)
def test_layer(
    n, depth, spatial, last, dtype, estimate, start, momentum, affines, offset
):
    layer = BCN(
        2 * depth,
        2,
        affine=affines,
        estimate=estimate,
        start=start,
        momentum=momentum,
    )
    layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = (torch.randn(n, 2 * depth, *spatial) + offset).to(dtype)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)

    dy = torch.randn(x.shape).to(dtype)

    def steps(own):
        out = []
        for training in (True, True, False):
            leaf = x.clone().requires_grad_()
            y = own.train(training)(leaf)
            y.backward(dy)
            if x.numel():
                assert leaf.grad.stride() == y.stride() == x.stride()
            out += [y.detach(), leaf.grad]
        gradients = [p.grad for p in own.parameters()]
        return out, gradients, list(own.buffers())

    best, plain = both_routes(steps, layer)
    x, dy = x.double(), dy.double()
    with using('eager'):
        exact = steps(copy.deepcopy(layer).double())
    eps = torch.finfo(dtype).eps
    # a result is rounded once, gradients of low precision by the CPU twice
    few, more = (4 * eps, 4 * eps + 1e-5), (1e-3, 1e-4)
    for tensors, (rtol, atol) in zip(zip(best, plain, exact), (few, more, more)):
        for got, want, true in zip(*tensors):
            # where variances are small, the plain route may be far off itself
            off = (want - true).abs()
            size = want.abs().max().item() if want.numel() else 0
            slack = rtol * want.abs() + atol * max(1, size) + 2 * off
            assert ((got - want).abs() <= slack).all()


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.half])
def test_standardization(dialect, dtype):
    conv = WSConv2d(4, 8, 3, dialect=dialect).to(dtype)

    grad = torch.randn(8, 4, 3, 3).to(dtype)

    def step(conv):
        weight = conv.standardized_weight()
        weight.backward(grad)
        return weight.detach(), conv.weight.grad

    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*both_routes(step, conv), rtol=100 * eps, atol=100 * eps)


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            WSConv2d(3, 8, 3),
            BCN(8, 2),
            nn.ReLU(),
            WSConv2d(8, 8, 3),
            SyncBCN(8, 2, estimate=False),
            nn.ReLU(),
        )

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.net(inputs).square().mean())


def train(rank, world, folder, choice):
    """An epoch with both hooks: what is left, and the operators called."""
    torch.manual_seed(0)
    pictures = torch.randn(4, 2, 3, 9, 9)
    hooks = EliminationSingularityHook(2, 2), SyncEstimatesHook()
    runner = Runner(
        Net(),
        work_dir=folder,
        train_dataloader=DataLoader(
            [dict(inputs=x) for x in pictures[rank::world]],
            collate_fn=operator.itemgetter(0),
        ),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        default_hooks=dict(checkpoint=None),
        custom_hooks=list(hooks),
        experiment_name=uuid.uuid4().hex,
    )
    with using(choice), Operators() as seen:
        runner.train()
    layers = hooks[0].results['layers']
    measured = {
        name: [layer['rate'], layer['margin'], layer['lag']]
        for name, layer in layers.items()
    }
    return [runner.model.state_dict(), measured], sorted(seen.names)


AROUND = {
    # what the elimination hook makes of its sums, on the CPU
    *('bitwise_and', 'bitwise_or', 'clamp', 'full_like', 'index', 'isfinite'),
    *('lift_fresh', 'max', 'median', 'min', 'ne', 'nonzero'),
    '_local_scalar_dense',
    # data, optimizer, and mmengine's messages between ranks
    *('_record_function_enter_new', '_record_function_exit', 'allgather_'),
    *('broadcast_', 'new_full', 'random_', 'resize_', 'scalar_tensor', 'set_'),
}


def test_hooks_on_two_ranks(tmp_path):
    native = on_ranks(2, train, str(tmp_path), 'auto')
    general = on_ranks(2, train, str(tmp_path), 'eager')
    for (want, _), (got, names) in zip(native, general):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        extra = set(names) - ORDINARY - AROUND
        assert not extra, ' '.join(sorted(extra))
