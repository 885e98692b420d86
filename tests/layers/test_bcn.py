"""BCN as a module: the law, and its edges."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import build_norm_layer
from support import reference
from support.layers import BATCH_STAGES, estimates, randomize, same
from torch import nn

from bcn_mm import BCN
from bcn_mm.ops import batch_channel_norm


@BATCH_STAGES
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


@BATCH_STAGES
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


@BATCH_STAGES
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


@BATCH_STAGES
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


@BATCH_STAGES
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


@BATCH_STAGES
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


@BATCH_STAGES
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
