import pytest
import torch
from conftest import needs_torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.runner.checkpoint import get_state_dict, weights_to_cpu
from support import reference
from torch import nn

from bcn_mm import BCN, WSConv1d, WSConv2d, WSConv3d
from bcn_mm.ops import DIALECTS
from bcn_mm.ops.kernels import BACKENDS, using
from bcn_mm.weights.unpickling import load_weights


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('kind', [WSConv1d, WSConv2d, WSConv3d])
@pytest.mark.parametrize('padding_mode', ['zeros', 'reflect'])
def test_is_the_convolution_with_standardized_weights(dialect, kind, padding_mode):
    dim = (WSConv1d, WSConv2d, WSConv3d).index(kind) + 1
    arguments = dict(stride=2, padding=1, groups=2, padding_mode=padding_mode)
    conv = kind(4, 6, 3, dialect=dialect, **arguments).double()
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](4, 6, 3, **arguments)
    plain = plain.double()
    with torch.no_grad():
        plain.weight.copy_(reference.standardize(conv.weight, dialect))
        plain.bias.copy_(conv.bias)
    x = torch.randn(2, 4, *[7] * dim, dtype=torch.double)
    torch.testing.assert_close(conv(x), plain(x))


def test_state_of_plain_and_conv_ws_loads():
    x = torch.randn(1, 4, 9, 9)
    theirs, ours = ConvWS2d(4, 8, 3), WSConv2d(4, 8, 3)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    ours.load_state_dict(nn.Conv2d(4, 8, 3).state_dict())
    assert set(ours.state_dict()) == {'weight', 'bias'}


def test_dialect_travels_with_the_weights(tmp_path):
    """...through mmengine's way of saving, weights_only."""
    net = nn.Sequential(WSConv2d(4, 8, 3, dialect='var'))
    path = tmp_path / 'ws.pth'
    torch.save(weights_to_cpu(get_state_dict(net)), path)
    state = load_weights(path)
    net.load_state_dict(state)
    with pytest.raises(RuntimeError, match="'var'.*dialect='std'"):
        nn.Sequential(WSConv2d(4, 8, 3)).load_state_dict(state)


def test_a_plain_dict_takes_the_weights():
    """As torch lets it, of any module."""
    conv, state = WSConv2d(3, 8, 3), {}
    conv.state_dict(destination=state, prefix='conv.')
    assert list(state) == ['conv.weight', 'conv.bias']


def test_autocast():
    """Standardization in float32, the convolution in low precision."""
    conv = WSConv2d(4, 8, 3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert conv.standardized_weight().dtype == torch.float32
        assert conv(torch.randn(1, 4, 5, 5)).dtype == torch.bfloat16


def test_built_by_mmcv():
    conv = build_conv_layer(dict(type='WSConv2d', dialect='var'), 3, 8, 3)
    assert type(conv) is WSConv2d and conv.dialect == 'var'
    assert "dialect='var'" in repr(conv)
    block = ConvModule(
        3, 8, 3, conv_cfg=dict(type='WSConv2d'), norm_cfg=dict(type='BCN')
    )
    assert type(block.norm) is BCN and block.conv.bias is None
    block(torch.randn(1, 3, 8, 8)).sum().backward()
    assert torch.isfinite(block.conv.weight.grad).all()


def edit_in_place(conv):
    with torch.no_grad():
        conv.weight.add_(torch.randn_like(conv.weight))


def step(optimizer, **kwargs):
    """Fused optimizers change weights without autograd's counting it."""

    def take_a_step(conv):
        conv.weight.grad = torch.randn_like(conv.weight)
        optimizer(conv.parameters(), 0.1, **kwargs).step()

    return take_a_step


def replace_memory(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def replace_parameter(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def move_and_back(conv):
    conv.double()
    conv.weight.data.mul_(torch.randn_like(conv.weight))
    conv.float()


def edit_data(conv):
    """What mmengine's EMA hook does."""
    conv.weight.data.copy_(torch.randn_like(conv.weight))


FUSED = needs_torch(2, 6, 'fused optimizers on the CPU')
CHANGES = (
    edit_in_place,
    *(
        step(getattr(torch.optim, name), **kwargs)
        for name in ('SGD', 'Adam', 'AdamW')
        for kwargs in (dict(), dict(foreach=True))
    ),
    *(
        pytest.param(step(getattr(torch.optim, name), fused=True), marks=FUSED)
        for name in ('SGD', 'Adam', 'AdamW')
    ),
    replace_memory,
    replace_parameter,
    move_and_back,
    edit_data,
    lambda conv: conv.load_state_dict(nn.Conv2d(4, 8, 3, bias=False).state_dict()),
    lambda conv: conv.load_state_dict(
        nn.Conv2d(4, 8, 3, bias=False).state_dict(), assign=True
    ),
    lambda conv: setattr(conv, 'dialect', 'var'),
    lambda conv: setattr(conv, 'eps', 1.0),
)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('training', [True, False])
def test_convolves_with_the_weight_as_it_is(change, mode, training):
    """...however it has been changed since the last pass."""
    conv = WSConv2d(4, 8, 3, bias=False).train(training)
    x = torch.randn(1, 4, 5, 5)
    for _ in range(2):
        with mode():
            before = conv(x)
        change(conv)
        with mode():
            want = nn.functional.conv2d(
                x.to(conv.weight),
                reference.standardize(conv.weight, conv.dialect, conv.eps),
            )
            torch.testing.assert_close(conv(x.to(conv.weight)), want)
        if change not in CHANGES[-2:]:  # those are the same a second time
            assert not torch.allclose(want, before)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dialect', DIALECTS)
def test_channels_last_weights_stay_channels_last(backend, dialect):
    conv = WSConv2d(4, 8, 3, dialect=dialect)
    if not BACKENDS[backend].serves(conv.weight):
        pytest.skip(f'{backend} does not serve the CPU')
    want = conv.standardized_weight()
    conv.to(memory_format=torch.channels_last)
    with using(backend):
        got = conv.standardized_weight()
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()


@needs_torch(2, 6, 'compiles autograd functions as a whole')
@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_compiles_without_a_graph_break(training, mode):
    conv = WSConv2d(4, 8, 3).train(training)
    compiled = torch.compile(conv, fullgraph=True)
    with mode():
        for size in (9, 12, 7):
            x = torch.randn(2, 4, size, size + 1)
            torch.testing.assert_close(compiled(x), conv(x), rtol=1e-5, atol=1e-5)


def test_takes_the_names_of_torch():
    conv = WSConv2d(4, 8, 3)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(conv(input=x), conv(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown.*'timm'.*'biased_var'"):
        WSConv2d(3, 8, 3, dialect='timm')
    with pytest.raises(ValueError, match='one weight.*plain convolution'):
        WSConv2d(8, 8, 1, groups=8)
    for sizes in ((3, 0), (0, 3), (0, 0)):
        with pytest.raises(ValueError, match='must be positive'):
            WSConv2d(*sizes, 3)
