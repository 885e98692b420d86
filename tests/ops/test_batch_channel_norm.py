import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from torch.autograd import gradcheck

from bcn_mm.ops import batch_channel_norm, default_num_groups
from bcn_mm.ops.kernels import BACKENDS, using

MODES = [
    pytest.param(dict(training=t, estimate=e), id=f'{m}-{s}')
    for t, m in ((True, 'training'), (False, 'evaluation'))
    for e, s in ((True, 'estimate'), (False, 'batch'))
]


def operands(channels, groups, dtype=torch.double):
    """Random statistics and affine parameters, none near a special value."""
    return dict(
        running_mean=torch.randn(channels, dtype=dtype),
        running_var=torch.rand(channels, dtype=dtype) + 0.5,
        batch_weight=torch.rand(channels, dtype=dtype) + 0.5,
        batch_bias=torch.randn(channels, dtype=dtype),
        weight=torch.rand(groups, dtype=dtype) + 0.5,
        bias=torch.randn(groups, dtype=dtype),
    )


AFFINE = ('batch_weight', 'batch_bias', 'weight', 'bias')


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    depth=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 4), max_size=3),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    channels_last=st.booleans(),
    training=st.booleans(),
    estimate=st.booleans(),
    momentum=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_definition(
    n,
    groups,
    depth,
    spatial,
    offset,
    channels_last,
    training,
    estimate,
    momentum,
    seed,
):
    torch.manual_seed(seed)
    channels = groups * depth
    given = operands(channels, groups)
    mode = dict(training=training, estimate=estimate, momentum=momentum)
    mean, var = given['running_mean'], given['running_var']
    leaves = [given[k].requires_grad_() for k in AFFINE]
    for _ in range(3):
        x = torch.randn(n, channels, *spatial, dtype=torch.double)
        x = x + offset * torch.randn(1, channels, *[1] * len(spatial))
        if channels_last and len(spatial) > 1:
            x = x.contiguous(
                memory_format=torch.channels_last
                if len(spatial) == 2
                else torch.channels_last_3d
            )
        x.requires_grad_()
        want, mean, var = reference.bcn(x, groups, mean, var, *leaves, **mode)
        got = batch_channel_norm(x, groups, **given, **mode)
        assert got.shape == x.shape and got.dtype == x.dtype
        assert got.stride() == torch.empty_like(x).stride()
        # the definition itself is as ill-conditioned as the input is large
        size = max(1.0, x.abs().max().item())
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * size)
        torch.testing.assert_close(
            (given['running_mean'], given['running_var']),
            (mean, var),
            rtol=1e-10,
            atol=1e-10,
        )
        dy = torch.randn_like(x)
        # where a variance is zero the true gradient is too, and what is left
        # is rounding, amplified by 1 / eps
        slack = 1e-10 if n * depth * x[0, 0].numel() > 1 else 1e-6
        few = not estimate and training and n * x[0, 0].numel() == 1
        slack = 1e-6 if few else slack
        for a, b in zip(
            torch.autograd.grad(got, [x, *leaves], dy),
            torch.autograd.grad(want, [x, *leaves], dy),
        ):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=1e-10, atol=slack * scale * size)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_gradcheck(mode, layout):
    groups, x = 2, torch.randn(2, 6, 2, 3, dtype=torch.double)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    given = operands(6, groups)
    mean, var = given.pop('running_mean'), given.pop('running_var')

    def function(x, *affines):
        # momentum 0: with estimates that move, a numerical derivative would
        # see them move, and autograd by definition does not
        return batch_channel_norm(
            x,
            groups,
            mean.clone(),
            var.clone(),
            *affines,
            momentum=0.0,
            **mode,
        )

    assert gradcheck(
        function,
        (x.requires_grad_(), *(p.requires_grad_() for p in given.values())),
    )


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('ratio', [0, 1, 3, 100])
@pytest.mark.parametrize('shape', [(1, 64, 50, 76), (2, 256, 32, 32), (64, 256, 7, 7)])
def test_float32_error_is_that_of_group_norm(mode, ratio, shape):
    """At most ten times F.group_norm's, against float64, also for offsets."""
    x = torch.randn(shape) + ratio
    dy = torch.randn(shape)
    channels = shape[1]
    start = dict(
        running_mean=torch.full((channels,), float(ratio)),
        running_var=torch.ones(channels),
    )

    def error(function):
        results = []
        for dtype in (torch.float, torch.double):
            leaf = x.to(dtype).requires_grad_()
            y = function(leaf)
            (grad,) = torch.autograd.grad(y, leaf, dy.to(dtype))
            results.append((y.detach().double(), grad.double()))
        return [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(*results)]

    def ours(x):
        own = {k: v.to(x.dtype, copy=True) for k, v in start.items()}
        return batch_channel_norm(x, 32, **own, **mode)

    theirs = error(lambda x: F.group_norm(x, 32))
    for own, other in zip(error(ours), theirs):
        assert own <= 10 * other


def composition(x, groups, mean, var, own, mode):
    """Batch norm, then group norm, as torch has them."""
    batch = mode['training'] and not mode['estimate']
    if batch and x[:, 0].numel() == 1:  # which torch refuses
        z = 0 * own['batch_weight'] + own['batch_bias']
        z = z.view(1, -1, 1) + 0 * x
    else:
        z = F.batch_norm(
            x,
            mean.clone(),
            var.clone(),
            own['batch_weight'],
            own['batch_bias'],
            batch,
        )
    weight, bias = (
        own[k].repeat_interleave(x.shape[1] // groups) for k in ('weight', 'bias')
    )
    return torch.group_norm(z, groups, weight, bias)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('backend', BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([1, 1, 2, 25, 400]),
    planes=st.sampled_from(['random', 'constant', 'equal', 'nearly']),
    offset=st.sampled_from([0.0, 0.3, 100.3]),
    scale=st.sampled_from([0.0, 1.0, 10.0]),
    gradient=st.sampled_from(['random', 'constant']),
    seed=st.integers(0, 999),
)
def test_error_is_near_that_of_batch_norm_and_group_norm(
    mode, backend, n, length, planes, offset, scale, gradient, seed
):
    """...in planes with little or no variance too, where 1 / std is large.

    Where a plane varies, its mean is rounded once more than theirs; what that
    may cost is seen by shifting planes by so much.
    """
    torch.manual_seed(seed)
    groups, channels = 4, 16
    start = operands(channels, groups, torch.float)
    for name in AFFINE:  # all near a special value
        start[name] = float('bias' not in name) + 0.01 * torch.randn_like(start[name])
    shape = n, channels, length
    x = torch.randn(shape)
    if planes == 'constant':
        x = torch.randn(n, channels, 1).expand(shape)
    elif planes == 'equal':
        x = torch.randn(1, channels, 1).expand(shape)
    elif planes == 'nearly':
        x = torch.randn(n, channels, 1) + 1e-3 * x
    x = x * scale + offset
    start['running_mean'] = start['running_mean'] * scale + offset
    dy = torch.randn(shape)
    if gradient == 'constant':
        dy = torch.randn(n, channels, 1).expand(shape)

    def differentiate(function, dtype, x=x):
        leaf = x.to(dtype).requires_grad_()
        own = {k: v.to(dtype, copy=True) for k, v in start.items()}
        leaves = [leaf, *(own[k].requires_grad_() for k in AFFINE)]
        y = function(leaf, own)
        grads = torch.autograd.grad(y, leaves, dy.to(dtype))
        return [t.detach().double() for t in (y, *grads)]

    known = {}

    def ours(x, own):
        mean, var = own.pop('running_mean'), own.pop('running_var')
        y = batch_channel_norm(x, groups, mean, var, **own, **mode)
        known[x.dtype] = mean, var
        return y

    def theirs(x, own):
        return composition(
            x, groups, *(t.to(x.dtype) for t in known[torch.double]), own, mode
        )

    with using(backend):
        exact = differentiate(ours, torch.double)
        got = differentiate(ours, torch.float)
    bar = differentiate(theirs, torch.float)
    shifted = x.double()
    if length > 1 and planes in ('random', 'nearly'):
        ulp = torch.finfo(x.dtype).eps * shifted.abs().amax(2, keepdim=True)
        shifted = shifted + ulp * torch.randn(n, channels, 1).sign()
    shifted = differentiate(theirs, torch.double, shifted)
    torch.testing.assert_close(  # that it is the same thing
        exact, differentiate(theirs, torch.double), rtol=1e-6, atol=1e-6
    )
    for value, *others in zip(exact, got, bar, shifted):
        error, allowed, rounding = ((t - value).abs().max().item() for t in others)
        floor = 1e-5 * value.abs().max().item() + 1e-5
        assert error <= 10 * allowed + 2 * rounding + floor


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_half_precision_is_the_float32_result_rounded(mode, dtype, layout):
    x = (torch.randn(2, 8, 9, 9) * 3 + 1).to(dtype)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn(2, 8, 9, 9).to(dtype)
    given = operands(8, 2, torch.float)
    results = []
    for leaf in (x, x.float()):
        own = {k: v.clone() for k, v in given.items()}
        leaf = leaf.clone().requires_grad_()
        with torch.autocast('cpu', dtype=dtype):
            y = batch_channel_norm(leaf, 2, **own, **mode)
        assert y.dtype == leaf.dtype
        (grad,) = torch.autograd.grad(y, leaf, dy.to(y.dtype))
        results.append((y.detach(), grad))
    ulp = torch.finfo(dtype).eps
    for low, full in zip(*results):
        # one rounding forward; backward writes twice, so two
        torch.testing.assert_close(
            low.float(), full, rtol=ulp, atol=ulp * full.abs().max().item()
        )


def test_large_batch_mode_is_batch_norm_then_group_norm():
    """...running statistics included, with unbiased variance as there."""
    bn = torch.nn.BatchNorm2d(8)
    mean, var = torch.zeros(8), torch.ones(8)
    for training in (True, True, False):
        bn.train(training)
        x = torch.randn(4, 8, 5, 5) * 2 + 3
        got = batch_channel_norm(
            x,
            2,
            mean,
            var,
            training=training,
            estimate=False,
            momentum=0.1,
        )
        torch.testing.assert_close(got, F.group_norm(bn(x), 2))
        torch.testing.assert_close(mean, bn.running_mean)
        torch.testing.assert_close(var, bn.running_var)


@pytest.mark.parametrize('mode', MODES)
def test_one_channel_per_group_is_instance_norm(mode):
    """Any batch stage is undone by groups of one, up to eps."""
    x = torch.randn(3, 4, 16, 16, dtype=torch.double)
    given = operands(4, 4)
    given['weight'].fill_(1)
    given['bias'].fill_(0)
    got = batch_channel_norm(x, 4, **given, **mode)
    torch.testing.assert_close(got, F.instance_norm(x), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 4]))
def test_channel_stage_statistics(seed, groups):
    """Each group of each sample leaves with mean bias and deviation weight."""
    torch.manual_seed(seed)
    given = operands(8, groups)
    y = batch_channel_norm(
        torch.randn(2, 8, 6, 6, dtype=torch.double),
        groups,
        **given,
        training=True,
    ).reshape(2, groups, -1)
    mean, std = y.mean(2), y.std(2, unbiased=False)
    torch.testing.assert_close(mean, given['bias'].expand(2, -1))
    torch.testing.assert_close(std, given['weight'].expand(2, -1), rtol=1e-3, atol=0)


@pytest.mark.parametrize('training', [True, False])
def test_samples_do_not_see_each_other(training):
    """Micro-batch BCN: permuting a batch permutes its result."""
    x = torch.randn(5, 6, 3, 3, dtype=torch.double)
    order = torch.randperm(5)
    given = operands(6, 2)

    def call(x):
        own = {k: v.clone() for k, v in given.items()}
        return batch_channel_norm(x, 2, **own, training=training)

    torch.testing.assert_close(call(x)[order], call(x[order]))


def passes(batches, momentum, start, mean, var):
    """Normalize one batch after the other; returns mean, variance, count."""
    mean, var = mean.clone(), var.clone()
    count = torch.tensor(0)
    for x in batches:
        batch_channel_norm(
            x,
            1,
            mean,
            var,
            training=True,
            momentum=momentum,
            start=start,
            num_batches_tracked=count,
        )
    return mean, var, count


@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from([(None, 'identity'), (None, 'average'), (0.1, 'average')]),
    number=st.integers(1, 10),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_an_average_is_that_of_all_samples(rule, number, batch, seed):
    """At rate 1 / n: mean and variance of all samples, whatever was before."""
    torch.manual_seed(seed)
    batches = torch.randn(number, batch, 3, 5, 5, dtype=torch.double)
    batches += 7 * torch.randn(number, batch, 3, 1, 1)
    old = torch.randn(3).double(), torch.rand(3).double()
    mean, var, count = passes(batches, *rule, *old)
    assert count == number
    samples = batches.transpose(0, 2).flatten(1)
    torch.testing.assert_close(mean, samples.mean(1))
    torch.testing.assert_close(var, samples.var(1, correction=0))


@pytest.mark.parametrize('start, early', [('first', 1), ('average', 3)])
def test_after_the_start_comes_the_papers_rule(start, early):
    momentum = 0.25
    batches = torch.randn(9, 2, 3, 5, 5, dtype=torch.double) * 2 + 3
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    mean, var, _ = passes(batches, momentum, start, zero, one)
    samples = batches[:early].transpose(0, 2).flatten(1)
    known = samples.mean(1), samples.var(1, correction=0)
    affine = operands(3, 1)
    affine = [affine[k] for k in AFFINE]
    for x in batches[early:]:
        known = reference.bcn(
            x,
            1,
            *known,
            *affine,
            training=True,
            estimate=True,
            momentum=momentum,
        )[1:]
    torch.testing.assert_close(mean, known[0])
    torch.testing.assert_close(var, known[1])
    plain = passes(batches, momentum, 'identity', zero, one)
    assert not torch.allclose(plain[1], var)


def test_a_start_needs_the_number_of_passes():
    x = torch.randn(2, 3, 4, 4)
    for rule in (dict(momentum=None), dict(start='first')):
        with pytest.raises(ValueError, match='needs num_batches_tracked'):
            batch_channel_norm(
                x, 1, torch.zeros(3), torch.ones(3), training=True, **rule
            )


@pytest.mark.parametrize('mode', MODES)
def test_kept_for_backward(mode):
    """The input once, at most four values per (sample, channel) beside it."""
    x = torch.randn(1, 64, 20, 30, requires_grad=True)
    given = operands(64, 32, torch.float)
    parameters = {given[k].requires_grad_().data_ptr() for k in AFFINE}
    kept = {}

    def pack(t):
        if t.data_ptr() not in parameters:  # held by the module anyway
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch_channel_norm(x, 32, **given, **mode)
    assert kept.pop(x.data_ptr()) == x.numel()
    assert sum(kept.values()) <= 4 * 64


def test_backward_twice_is_refused():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    y = batch_channel_norm(x, 2, torch.zeros(4), torch.ones(4))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize(
    'channels, groups',
    [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (18, 2),
        (24, 8),
        (32, 16),
        (64, 32),
        (72, 8),
        (96, 32),
        (2048, 32),
    ],
)
def test_default_num_groups(channels, groups):
    assert default_num_groups(channels) == groups


@given(channels=st.integers(1, 4096))
def test_default_num_groups_is_the_largest_that_qualifies(channels):
    best = max(
        (
            g
            for g in range(1, 33)
            if 32 % g == 0 and channels % g == 0 and channels // g >= 2
        ),
        default=1,
    )
    assert default_num_groups(channels) == best


@pytest.mark.parametrize(
    'shape, groups, message',
    [
        ((4,), 2, r'2 to 5 dimensions.*\(4,\)'),
        ((1, 4, 1, 1, 1, 1), 2, '2 to 5 dimensions'),
        ((1, 6, 2, 2), 2, r'expected 4 channels.*\(1, 6, 2, 2\)'),
        ((1, 4, 2, 2), 3, 'num_groups=3 does not divide 4'),
        ((1, 4, 2, 2), 0, 'num_groups=0 does not divide 4'),
    ],
)
def test_bad_input(shape, groups, message):
    with pytest.raises(ValueError, match=message):
        batch_channel_norm(torch.randn(shape), groups, torch.zeros(4), torch.ones(4))
