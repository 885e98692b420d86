"""How estimates begin, and what they are averages of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.operands import AFFINE, operands

from bcn_mm.ops import batch_channel_norm


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
    # 0.09 is below 1 / 10, so that the last pass is averaged too
    rule=st.sampled_from([(None, 'identity'), (None, 'average'), (0.09, 'average')]),
    number=st.integers(1, 10),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_an_average_is_that_of_all_samples(backend, rule, number, batch, seed):
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


@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from([(None, 'identity'), (0.01, 'first'), (0.01, 'average')]),
    mean=st.sampled_from([20.0, -300.0, 4000.0]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_start_far_from_zero_does_not_cancel(backend, rule, mean, batch, seed):
    """Of values as far apart as 1000 roundings of their mean."""
    torch.manual_seed(seed)
    apart = 1e3 * torch.finfo(torch.float32).eps * abs(mean)
    x = (torch.randn(batch, 3, 9, 9).double() * apart + mean).float()
    got_mean, got_var, _ = passes([x], *rule, torch.zeros(3), torch.ones(3))
    samples = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(got_mean.double(), samples.mean(1), rtol=2e-7, atol=0)
    want = samples.var(1, correction=0)
    torch.testing.assert_close(got_var.double(), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize('start', ['first', 'average'])
@pytest.mark.parametrize('batch', [1, 3, 100])
def test_a_start_with_constant_channels(backend, start, batch):
    value = 1e6 * (1 + torch.rand(1, 64, 1, 1))
    x = value.expand(batch, 64, 2, 2).contiguous()
    mean, var, _ = passes([x], 0.01, start, torch.zeros(64), torch.ones(64))
    torch.testing.assert_close(mean, value.flatten(), rtol=2e-7, atol=0)
    assert (var >= 0).all()


@pytest.mark.parametrize('start', ['first', 'average'])
def test_a_start_far_from_zero_in_float64(backend, start):
    x = torch.randn(3, 4, 8, 8, dtype=torch.double) + 1e8
    zero, one = torch.zeros(4).double(), torch.ones(4).double()
    mean, var, _ = passes([x], 0.01, start, zero, one)
    across = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, across.mean(1), rtol=1e-15, atol=0)
    torch.testing.assert_close(var, across.var(1, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize('start, early', [('first', 1), ('average', 3)])
def test_after_the_start_comes_the_papers_rule(backend, start, early):
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


@pytest.mark.parametrize('dtype', [torch.int32, torch.int64, torch.uint8])
def test_passes_are_counted_in_any_integer(backend, dtype):
    count = torch.tensor(3, dtype=dtype)
    mean = torch.zeros(3)
    for _ in range(2):
        batch_channel_norm(
            torch.ones(2, 3, 4, 4),
            1,
            mean,
            torch.ones(3),
            training=True,
            momentum=None,
            num_batches_tracked=count,
        )
    assert count == 5 and count.dtype == dtype
    # a fourth of the way in the fourth pass, a fifth in the fifth
    torch.testing.assert_close(mean, torch.full((3,), 1 - 3 / 4 * 4 / 5))
