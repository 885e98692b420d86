"""Triton without a card: when it is taken, and how often it launches what.

Numbers are looked at through its interpreter, which has to be asked for before
Triton is imported, so in processes of their own.
"""

import math
import re
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import needs_torch
from support.operands import AFFINE, LAYOUTS, operands
from torch.utils._python_dispatch import TorchDispatchMode

from bcn_mm.ops import batch_channel_norm, estimates, kernels, stages
from bcn_mm.ops.kernels import eager, triton

FOLDER = Path(__file__).parent
MODULES = [f'bcn_mm.ops.kernels.triton_{name}' for name in ('kernels', 'stages')]


@pytest.fixture
def interpreted(python):
    pytest.importorskip('triton', minversion='3')

    def run(file, *words):
        said = python(
            '-m',
            'pytest',
            '-p',
            'no:cacheprovider',
            FOLDER / file,
            *words,
            TRITON_INTERPRET='1',
            BCN_MM_KERNELS='triton',
        )
        return int(said.rsplit(' passed', 1)[0].rsplit(' ', 1)[1])

    return run


@pytest.mark.slow
def test_whole_passes(interpreted):
    assert interpreted('test_triton_passes.py') > 100


@pytest.mark.slow
def test_the_contract(interpreted):
    """...but for portions, which it has not, and what bfloat16 is rounded to.

    The interpreter cuts off there, so that equal planes are at_mean's neighbour.
    A kernel knows a half precision by the type of its pointers alone, and a layout
    by its indices, so that one of the two halves is tried in one layout.
    """
    left_out = 'not portions and not (bfloat16 and (planes or channels_last))'
    assert interpreted('test_contract.py', '-k', f'triton and {left_out}') > 300


def test_is_imported_when_it_is_needed(python):
    code = """
import sys, torch, bcn_mm
layer = bcn_mm.BCN(8)
layer(torch.randn(2, 8, 3, 3)).sum().backward()
assert not set(sys.argv[1:]) & set(sys.modules)
"""
    python('-c', code, *MODULES)


class Launcher:
    """In place of a kernel: takes note of a launch, and does nothing."""

    def __init__(self, launched, name):
        self.launched, self.name = launched, name

    def __getitem__(self, grid):
        (programs,) = grid
        assert 0 < programs < 1 << 31
        return lambda *args, **options: self.launched.append(self.name)


class Raises:
    def __getitem__(self, grid):
        raise ValueError('no such card\nand more')


NAMES = [
    f'{name}_kernel'
    for name in (
        'moments',
        'merge',
        'stages',
        'apply',
        'reduce',
        'gradients',
        'gradient',
        'standardize',
        'standardize_backward',
    )
]


@pytest.fixture
def launched(monkeypatch):
    """Triton as if there were a card, and what is launched on it."""
    names, backend = [], triton.Triton()
    table = {name: Launcher(names, name) for name in NAMES}
    monkeypatch.setattr(triton, '_kernels', lambda: type('Kernels', (), table))
    monkeypatch.setattr(triton, '_interprets', lambda: True)
    monkeypatch.setattr(backend, 'objection', lambda x: '')
    monkeypatch.setitem(kernels.BACKENDS, 'triton', backend)
    with kernels.using('triton'):
        yield names


class Allocations(TorchDispatchMode):
    """How many elements whatever is made anew has."""

    def __init__(self, *there):
        super().__init__()
        self.sizes, self.seen = [], {t.untyped_storage().data_ptr() for t in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                place = t.untyped_storage().data_ptr()
                if place not in self.seen:
                    self.sizes.append(t.numel())
                self.seen.add(place)
        return result


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('estimate', [True, False])
@pytest.mark.parametrize('training', [True, False])
def test_three_launches_and_one_tensor_each_way(
    launched, layout, dtype, estimate, training
):
    x = layout(torch.randn(2, 16, 40, 40).to(dtype)).requires_grad_()
    known = {k: t.float() for k, t in operands(16, 4).items()}
    for name in AFFINE:
        known[name].requires_grad_()
    count = torch.tensor(0)
    dy = torch.empty_like(x)

    def forward():
        return batch_channel_norm(
            x,
            4,
            training=training,
            estimate=estimate,
            start='average',
            num_batches_tracked=count,
            **known,
        )

    kept = []
    with Allocations(x) as made, torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t) or t, lambda t: t
    ):
        y = forward()
    assert launched == ['moments_kernel', 'stages_kernel', 'apply_kernel']
    large = [n for n in made.sizes if n >= x.numel() // 8]
    assert large == [x.numel()]
    # 4 values for every row beside x and the parameters
    own = [t for t in kept if t is not x and all(t is not p for p in known.values())]
    assert sum(t.numel() for t in own) <= 4 * 2 * 16
    assert y.stride() == x.stride()

    launched.clear()
    with Allocations(x, y, dy) as made:
        dx, *_ = torch.autograd.grad(y, [x, *(known[k] for k in AFFINE)], dy)
    assert launched == ['reduce_kernel', 'gradients_kernel', 'gradient_kernel']
    assert [n for n in made.sizes if n >= x.numel() // 8] == [x.numel()]
    assert dx.stride() == x.stride() and dx.dtype == dtype

    launched.clear()
    with torch.no_grad():
        forward()
    assert len(launched) == 3


@pytest.mark.parametrize('last', [True, False])
@pytest.mark.parametrize(
    'shape',
    [
        (1, 1, 1),
        (1, 64, 600 * 800),
        (64, 2048, 49),
        (2, 256, 200 * 304),
        (4096, 256, 49),
        (1, 3, 1 << 33),
        (1 << 20, 512, 2),
        (1, 1 << 20, 5),
        (3, 7, 11),
    ],
)
def test_every_position_is_of_one_tile_and_one_chunk(shape, last):
    n, c, length = shape
    cut = triton.plan(n, c, length, last)
    _, _, chunks, chunk, _, br, bl = cut.chunked
    assert chunk % bl == 0 and (chunks - 1) * chunk < length <= chunks * chunk
    tiles = cut.tiled[2]
    assert (tiles - 1) * bl < length <= tiles * bl
    blocks = n * -(-c // br)
    assert cut.chunk_programs == blocks * chunks
    assert cut.tile_programs == blocks * tiles
    if n * c * length < 1 << 40:
        assert blocks * tiles < 1 << 31
    assert br * bl <= 1024
    for depth in {1, c}:
        tile = triton.group_plan(cut, depth).tile
        assert tile[2] >= chunks
        assert math.prod(tile) <= 1024
    # powers of two, which Triton asks for
    for size in (br, bl, *tile):
        assert size & (size - 1) == 0


class Compiled:
    """What a launch gives back, and what it is launched with again."""

    function, packed_metadata = 'function', 'metadata'

    def __init__(self, name, again):
        self.name, self.again = name, again

    def run(self, *args):
        self.again.append((self.name, args))


@pytest.fixture
def passes(monkeypatch):
    """A backend, the kernels that Triton has launched for it, and those again."""
    first, again, backend = [], [], triton.Triton()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def call(*args, **options):
                first.append((self.name, (*grid, 1, 1, *args)))
                return Compiled(self.name, again)

            return call

    table = {name: Kernel(name) for name in NAMES}
    monkeypatch.setattr(triton, '_kernels', lambda: type('Kernels', (), table))
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: stream)
    return backend, first, again


def make_passes(backend, x, groups=4, training=True):
    affine = {k: t.float() for k, t in operands(x.shape[1], groups).items()}
    mean, var = affine.pop('running_mean'), affine.pop('running_var')
    running = estimates.Running(mean, var, torch.tensor(0))
    affine = stages.Affine(**affine)
    rule = estimates.Rule(training, True, 0.1, 'average', 1e-5)
    spec = stages.Spec(groups, 1e-5, False)
    y, saved = backend.forward(x, running, rule, affine, spec)
    backend.backward(y, x, saved, affine, rule, spec, True)
    weight = torch.randn(8, 3, 3, 3)
    _, saved = backend.standardize(weight, 1e-5, True, False)
    backend.standardize_backward(weight, weight, saved, True, False)


def alike(args):
    return [a.shape if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_equal_passes_launch_what_is_compiled(passes, layout):
    backend, first, again = passes
    x = layout(torch.randn(2, 16, 8, 8))
    make_passes(backend, x)
    assert len(first) == 8 and not again
    make_passes(backend, x)
    assert len(first) == 8 and len(again) == 8
    for (name, given), (other, args) in zip(first, again):
        # grid, stream, what was compiled, three that nobody listens to
        how = args[3:9]
        assert how == (7, 'function', 'metadata', None, None, None)
        assert name == other and alike(given) == alike(args[:3] + args[9:])


@pytest.mark.parametrize(
    'other',
    [
        dict(x=torch.randn(2, 16, 8, 9)),
        dict(x=torch.randn(3, 16, 8, 8)),
        dict(x=torch.randn(2, 16, 8, 8).half()),
        dict(x=torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)),
        dict(groups=2),
        dict(x=torch.randn(2 * 16 * 8 * 8 + 1)[1:].view(2, 16, 8, 8)),
    ],
    ids=['size', 'samples', 'dtype', 'layout', 'groups', 'address'],
)
def test_other_passes_are_for_triton_to_compile(passes, other):
    backend, first, again = passes
    x = torch.randn(2, 16, 8, 8)
    make_passes(backend, x)
    first.clear()
    for _ in range(2):  # an address that is not aligned never is
        make_passes(backend, **dict(dict(x=x), **other))
        assert len(first) >= 6
        if other.get('x', x).data_ptr() % 16 == 0:
            break
        first.clear()


def test_what_cannot_be_launched_again_is_launched_anew(monkeypatch):
    monkeypatch.setattr(triton, '_interprets', lambda: True)
    tried = []

    def disagreement(backend, device, dtype):
        tried.append(backend._direct)
        return 'no such way' if backend._direct else ''

    monkeypatch.setattr(triton, 'disagreement', disagreement)
    backend = triton.Triton()
    assert not backend.objection(torch.randn(2, 4))
    assert tried == [True, False] and not backend._direct


@pytest.fixture
def alone(monkeypatch):
    """``auto`` between a Triton that takes the CPU's tensors and the plain path."""
    fresh = triton.Triton()
    monkeypatch.setattr(triton, '_interprets', lambda: True)
    known = {'triton': fresh, 'eager': eager.Eager()}
    monkeypatch.setattr(kernels, 'BACKENDS', known)
    monkeypatch.setattr(kernels, '_BEST_FIRST', tuple(known.values()))
    monkeypatch.setattr(kernels, '_said', set())
    triton._kernels.cache_clear()
    yield fresh
    monkeypatch.undo()
    getattr(triton._kernels, 'cache_clear', bool)()


def without_triton(monkeypatch):
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(kernels, name.rsplit('.', 1)[1], raising=False)
    monkeypatch.setitem(sys.modules, 'triton', None)


def that_raises(monkeypatch):
    table = dict.fromkeys(NAMES, Raises())
    monkeypatch.setattr(triton, '_kernels', lambda: type('Kernels', (), table))


def that_does_nothing(monkeypatch):
    table = dict.fromkeys(NAMES, Launcher([], ''))
    monkeypatch.setattr(triton, '_kernels', lambda: type('Kernels', (), table))


@pytest.mark.parametrize(
    'fault, why',
    [
        (without_triton, 'Triton cannot be imported: ModuleNotFoundError: '),
        (that_raises, 'fails for torch.float32 on cpu: ValueError: no such card$'),
        (that_does_nothing, 'is wrong for torch.float32 on cpu: y is off by '),
    ],
)
def test_faults_end_in_the_plain_path(alone, monkeypatch, fault, why):
    fault(monkeypatch)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    known = {k: t.float() for k, t in operands(4, 2).items()}
    state = torch.get_rng_state()
    results = []
    for choice in ('eager', 'auto', 'auto'):
        moving = {k: t.clone() for k, t in known.items()}
        with kernels.using(choice), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            y = batch_channel_norm(x, 2, training=True, **moving)
            (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, dx, *moving.values()))
        # once, for all passes
        assert len(said) == (len(results) == 2)
        if said:
            (line,) = str(said[0].message).splitlines()
            assert line.startswith('the plain path of BCN is taken instead of Triton()')
            assert re.search(why, line)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    with kernels.using('triton'), pytest.raises(RuntimeError, match=why):
        batch_channel_norm(x, 2, training=True, **known)


def test_is_tried_once_and_not_while_a_graph_is_captured(monkeypatch):
    tried, capturing = [], True

    def disagreement(*where):
        time.sleep(0.05)
        tried.append(where)
        return ''

    monkeypatch.setattr(triton, 'disagreement', disagreement)
    monkeypatch.setattr(triton.Triton, '_could', staticmethod(lambda x: True))
    monkeypatch.setattr(triton.Triton, 'missing', lambda self: '')
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: capturing)
    backend = triton.Triton()
    x = types.SimpleNamespace(is_cuda=True, device='cuda:0', dtype=torch.float32)
    assert 'the capture of a CUDA graph' in backend.objection(x)
    capturing = False
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(backend.objection, [x] * 8)) == {''}
    capturing = True
    assert backend.objection(x) == ''
    assert tried == [(backend, 'cuda:0', torch.float32)]


@needs_torch(2, 1, 'to be told of writes')
def test_autograd_knows_that_estimates_move(launched):
    known = {k: t.float() for k, t in operands(4, 2).items()}
    leaf = torch.randn(4, requires_grad=True)
    loss = (leaf * known['running_mean']).sum()
    batch_channel_norm(torch.randn(2, 4, 3, 3), 2, training=True, **known)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_another_dtype_is_not_tried(alone, monkeypatch):
    that_raises(monkeypatch)
    x = torch.randn(2, 4, 3, 3).double()
    with kernels.using('auto'), warnings.catch_warnings():
        warnings.simplefilter('error')
        assert type(kernels.kernels_for(x)) is eager.Eager
    message = 'triton does not serve torch.float64 on cpu$'
    with kernels.using('triton'), pytest.raises(RuntimeError, match=message):
        kernels.kernels_for(x)
