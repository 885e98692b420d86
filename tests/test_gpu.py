"""The contract on CUDA, ``bash tools/run_tests.sh -m gpu``.

The definition of reference.py, in float64 on the CPU, is what results on the
GPU are held against.
"""

import json
from pathlib import Path

import pytest
import torch
from mmcv.ops import get_compiling_cuda_version
from support import reference
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN, WSConv2d, recompute_activations
from bcn_mm.ops import DIALECTS, standardize_weight
from bcn_mm.ops.kernels import BACKENDS, kernels_for

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip('no CUDA device', allow_module_level=True)

CUDA = torch.device('cuda')
MODES = pytest.mark.parametrize('estimate', [True, False])
# of a float32 result, relative to its largest value
ERROR = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def moved(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 4)
    return layer


def close(got, want, dtype, factor=1):
    """Within the dtype's error of the largest value."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape
    if want.numel():
        size = max(1.0, want.abs().max().item())
        assert (got - want).abs().max() <= factor * ERROR[dtype] * size


@MODES
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', list(ERROR))
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize(
    'shape',
    [
        (1, 64, 50, 76),
        (2, 256, 32, 32),
        (64, 64, 7, 7),
        (2, 32, 1, 1),
        (1, 256, 1, 1),
        (1, 64, 200, 304),
    ],
)
@pytest.mark.parametrize('offset', [0.0, 10.0])
def test_agrees_with_the_definition(estimate, training, dtype, layout, shape, offset):
    low = dtype in (torch.float16, torch.bfloat16)
    layer = moved(BCN(shape[1], estimate=estimate, momentum=0.1).double())
    x = (torch.randn(shape) + offset).to(dtype)
    dy = torch.randn(shape).to(dtype)
    leaves = [x.double().requires_grad_(), *layer.parameters()]
    names = ('batch_weight', 'batch_bias', 'weight', 'bias')
    want, mean, var = reference.bcn(
        leaves[0],
        layer.num_groups,
        layer.running_mean,
        layer.running_var,
        *(getattr(layer, name) for name in names),
        training,
        estimate,
        0.1,
    )
    wants = torch.autograd.grad(want, leaves, dy.double())
    layer.to(CUDA, torch.float32 if low else dtype).train(training)
    memory = torch.contiguous_format
    if layout == 'channels_last':
        memory = torch.channels_last
    leaf = x.to(CUDA).contiguous(memory_format=memory).requires_grad_()
    got = layer(leaf)
    assert got.dtype == dtype and got.stride() == leaf.stride()
    close(got, want, dtype)
    gots = torch.autograd.grad(got, [leaf, *layer.parameters()], dy.to(CUDA))
    if shape[0] * shape[2] > 2:  # else the true gradient is all but zero
        for a, b in zip(gots, wants):
            close(a, b, dtype, 4)
    for a, b in ((layer.running_mean, mean), (layer.running_var, var)):
        close(a, b, torch.float32 if low else dtype)


@pytest.mark.parametrize('dtype', [d for d in ERROR if d != torch.float64])
def test_triton_agrees_and_is_taken(dtype):
    x = torch.randn(2, 8, 5, 5, device=CUDA).to(dtype)
    triton = BACKENDS['triton']
    assert not triton.objection(x)
    assert kernels_for(x) is triton


@MODES
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('low', [True, False])
@pytest.mark.parametrize('shape', [(2, 64, 40, 60), (1, 256, 7, 7)])
def test_three_launches_each_way(estimate, training, low, shape):
    layer = BCN(shape[1], estimate=estimate).to(CUDA).train(training)
    x = torch.randn(shape, device=CUDA, dtype=torch.half if low else torch.float)
    x, dy = x.requires_grad_(), torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    torch.autograd.grad(layer(x), inputs, dy)  # compiles

    def launches(call):
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            result = call()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events()]
        return result, [name for name in names if name.endswith('_kernel')], names

    y, own, names = launches(lambda: layer(x))
    assert own == ['moments_kernel', 'stages_kernel', 'apply_kernel'], names
    _, own, names = launches(lambda: torch.autograd.grad(y, inputs, dy))
    assert own == ['reduce_kernel', 'gradients_kernel', 'gradient_kernel'], names


@MODES
@pytest.mark.parametrize('shape', [(0, 8, 7, 7), (2, 8, 0, 4)])
def test_empty_input(estimate, shape):
    layer = BCN(8, 2, estimate=estimate).to(CUDA)
    x = torch.randn(shape, device=CUDA, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == shape and not layer.num_batches_tracked.item()
    assert not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('ratio, error', [(1e2, 1e-5), (1e4, 1e-3)])
def test_variance_of_large_means(ratio, error):
    """var_mean adds up in float32 here, in float64 on the CPU."""
    layer = BCN(64, momentum=1.0).to(CUDA)
    x = torch.randn(2, 64, 100, 150, dtype=torch.double) + ratio
    layer.running_mean.fill_(ratio)
    layer(x.float().to(CUDA))
    want = x.float().double().sub(ratio).square().mean((0, 2, 3))
    torch.testing.assert_close(
        layer.running_var.cpu().double(), want, rtol=error, atol=0
    )


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_standardization(dialect, layout):
    weight = torch.randn(64, 32, 3, 3, dtype=torch.double)
    grad = torch.randn_like(weight)
    exact = weight.clone().requires_grad_()
    reference.standardize(exact, dialect).backward(grad)
    leaf = weight.float().to(CUDA)
    if layout == 'channels_last':
        leaf = leaf.contiguous(memory_format=torch.channels_last)
    got = standardize_weight(leaf.requires_grad_(), dialect=dialect)
    assert got.stride() == leaf.stride()
    got.backward(grad.float().to(CUDA))
    close(got, reference.standardize(weight, dialect), torch.float32)
    close(leaf.grad, exact.grad, torch.float32)


@MODES
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('low', [True, False])
def test_no_host_synchronisation(estimate, training, low):
    net = nn.Sequential(
        WSConv2d(8, 8, 3), BCN(8, 2, estimate=estimate), nn.ReLU(inplace=True)
    )
    net.to(CUDA).train(training)
    x = torch.randn(2, 8, 20, 20, device=CUDA, requires_grad=True)
    with torch.autocast('cuda', torch.float16, low):
        net(x).sum().backward()  # what libraries do the first time
        torch.cuda.set_sync_debug_mode('error')
        try:
            net(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_low_precision_is_not_copied_in_full(layout):
    layer = BCN(64).to(CUDA)
    x = torch.randn(4, 64, 1024, 1024, device=CUDA, dtype=torch.half)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    # the result, and a few portions of 64 MiB; a copy alone would be two sizes
    allowed = 1.5 * x.numel() * x.element_size() + (64 << 20) * 4

    def measure(call):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        assert torch.cuda.max_memory_allocated() - before <= allowed
        return result

    y = measure(lambda: layer(x))
    measure(lambda: y.backward(y.detach()))


@MODES
def test_amp_with_a_grad_scaler(estimate):
    """It trains, and steps that overflow leave finite estimates."""
    torch.manual_seed(0)
    net = nn.Sequential(
        WSConv2d(3, 16, 3, padding=1),
        BCN(16, estimate=estimate),
        nn.ReLU(),
        nn.Conv2d(16, 1, 1),
    )
    net.to(CUDA, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler('cuda', init_scale=2.0**40)
    x = torch.randn(4, 3, 32, 32, device=CUDA)
    target = x.mean(1, keepdim=True)
    losses, scales = [], []
    for step in range(80):
        inputs = x * (1e6 if step == 40 else 1)
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16):
            out = net(inputs)
        loss = (out.float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        for value in net.state_dict().values():
            assert torch.isfinite(value).all()
    assert min(scales) < 2.0**40  # there was an overflow
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing(reentrant):
    results = []
    for wrap in (
        lambda f, x: f(x),
        lambda f, x: checkpoint(f, x, use_reentrant=reentrant),
    ):
        torch.manual_seed(0)
        layer = BCN(8, 2, momentum=0.5).double().to(CUDA)
        inputs = torch.randn(5, 2, 8, 6, 6, device=CUDA).double()
        inputs = inputs.requires_grad_()
        sum(
            wrap(layer, x * (i + 1)).pow(3).sum() for i, x in enumerate(inputs)
        ).backward()
        results.append((inputs.grad, list(layer.buffers())))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_moves_between_devices():
    layer = BCN(8, 2)
    for device in ('cpu', CUDA, 'cpu'):
        layer.to(device)
        x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    state = nn.BatchNorm2d(8).to(CUDA).state_dict()
    del state['num_batches_tracked']
    layer.load_state_dict(state, assign=True)
    assert {b.device for b in layer.buffers()} == {layer.weight.device}
    layer(torch.randn(2, 8, 4, 4, device=CUDA))


def test_cuda_graphs():
    net = nn.Sequential(WSConv2d(8, 8, 3), BCN(8, 2)).to(CUDA).eval()
    x = torch.randn(2, 8, 9, 9, device=CUDA)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        x.copy_(torch.randn_like(x))
        net[0].weight.add_(1e-2 * torch.randn_like(net[0].weight))
        graph.replay()
        torch.testing.assert_close(y, net(x))


@pytest.mark.parametrize('low', [None, torch.float16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_recomputed_activations(low, layout):
    """To the same bits as without, in less memory."""

    class Block(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            out += x
            return nn.functional.relu(out, inplace=True)

    def block():
        return Block(
            WSConv2d(64, 64, 3, padding=1),
            BCN(64),
            nn.ReLU(inplace=True),
            WSConv2d(64, 64, 1),
            BCN(64),
        )

    def train(recompute):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), BCN(64), nn.ReLU(), block(), block()
        ).to(CUDA, memory_format=layout)
        if recompute:
            recompute_activations(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        values, kept = [], 0
        for _ in range(3):
            x = torch.randn(2, 3, 96, 64, device=CUDA).to(memory_format=layout)
            before = torch.cuda.memory_allocated()
            with torch.autocast('cuda', low, enabled=low is not None):
                loss = net(x).float().square().mean()
            kept = torch.cuda.memory_allocated() - before
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values += [loss, *(p.grad.clone() for p in net.parameters())]
        return values + list(net.state_dict().values()), kept

    with torch.backends.cudnn.flags(deterministic=True):
        (want, without), (got, kept) = train(False), train(True)
    assert all(map(torch.equal, got, want))
    assert kept < 0.8 * without


@pytest.mark.slow
@MODES
def test_compiles(estimate):
    net = nn.Sequential(WSConv2d(4, 8, 3), BCN(8, estimate=estimate))
    net.to(CUDA)
    compiled = torch.compile(net, fullgraph=True)
    for size in (9, 14, 30):
        x = torch.randn(2, 4, size, size, device=CUDA)
        with torch.autocast('cuda', torch.float16):
            y = compiled(x)
            y.float().square().sum().backward()
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())


TASKS = {
    'det': (
        'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py',
        ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2'],
        'epoch_1.pth',
    ),
    'seg': (
        'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py',
        [
            'train_cfg.max_iters=24',
            'train_cfg.val_interval=24',
            'default_hooks.checkpoint.interval=12',
        ],
        'iter_12.pth',
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(
    get_compiling_cuda_version() == 'not available',
    reason="this mmcv has no CUDA operators, which mmdet's models need",
)
@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('amp', [False, True])
def test_trains_and_resumes(task, amp, shapes, tmp_path, python):
    """Mask R-CNN and DeepLabV3 by ``tools/train.py``."""
    config, settings, saved = TASKS[task]
    settings = ['--cfg-options', *settings, 'default_hooks.logger.interval=4']
    command = ['tools/train.py', config, '--work-dir', tmp_path]
    command += ['--amp'] if amp else []
    python(*command, *settings, SHAPES_ROOT=str(shapes))
    python(
        *command,
        '--resume',
        tmp_path / saved,
        *settings,
        SHAPES_ROOT=str(shapes),
    )
    for file in Path(tmp_path).glob('*/vis_data/scalars.json'):
        records = [json.loads(line) for line in file.open()]
        assert all(0 < r['loss'] < 1e3 for r in records if 'loss' in r)
    state = torch.load(sorted(tmp_path.glob('*.pth'))[-1], map_location='cpu')
    for name, value in state['state_dict'].items():
        if 'running' in name:
            assert torch.isfinite(value).all() and value.ne(0).any(), name
