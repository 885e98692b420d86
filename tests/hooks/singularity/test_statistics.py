"""The numbers are those of the tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from support.singularity import (
    CHANNELS,
    NORMS,
    Broken,
    Kept,
    channels,
    check,
    estimates_of,
    images,
    train,
    warning_in,
)
from torch import nn

from bcn_mm import BCN, EliminationSingularityHook

CASES = {
    **{kind: dict(make=make) for kind, make in NORMS.items()},
    'levels': dict(make=NORMS['BCN'], levels=True),
    'far means': dict(make=NORMS['BCN'], offset=1000.0),
    'checkpointed': dict(make=NORMS['GN'], cp=False),
    'checkpointed, reentrant': dict(make=NORMS['BCN'], cp=True),
    'bfloat16': dict(make=NORMS['BCN'], amp=True),
}


@pytest.mark.parametrize('case', CASES)
def test_statistics_are_those_of_the_window(case, tmp_path):
    body = Kept(**CASES[case])
    hook = EliminationSingularityHook(
        interval=4, window=3, dead_below=0.3, near_below=-0.3
    )
    # the last batch is in no window that ends, one has no samples at all
    batches = images(9)
    if case == 'GN':  # the one that takes it
        batches[6] = batches[6][:0]
    seen = []

    class Look(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, *args, **kwargs):
            if (runner.iter + 1) % 4 == 0:
                seen.append((copy.deepcopy(hook.results), copy.deepcopy(body)))

    train(body, batches, tmp_path, hook, Look())
    assert [results['step'] for results, _ in seen] == [4, 8]
    for results, body in seen:
        layers = results['layers']
        assert list(layers) == ['body.norm', 'body.head']
        for name, calls in (('norm', 1), ('head', 2)):
            norm = getattr(body, name)
            check(
                layers[f'body.{name}'],
                body.kept[name][-3 * calls :],
                estimates_of(norm),
                dead=0.3,
                near=-0.3,
                close=2e-3 if case == 'far means' else 1e-5,
            )
        network = results['network']
        margins = torch.cat([layer['margin'] for layer in layers.values()])
        assert network['margin_min'] == margins.min()
        assert network['margin_median'] == margins.median()
        for key in ('dead', 'near'):
            found = [layer[f'{key}_channels'] for layer in layers.values()]
            assert network[key] == sum(map(len, found)) / len(margins)
    # outside of its windows nothing of the hook is there; within, a hook for
    # each norm, and in the first step what sees where their outputs go
    assert body.hooks == [0, 3, 2, 2, 0, 3, 2, 2]


@pytest.mark.parametrize('kind', NORMS)
def test_eliminated_channels_are_found(kind, tmp_path):
    dead = dict(norm=[1, 6], head=[])
    hook = EliminationSingularityHook(interval=3, window=3)
    body = Kept(NORMS[kind])
    for name, indices in dead.items():
        norm = getattr(body, name)
        bias = norm.batch_bias if isinstance(norm, BCN) else norm.bias
        with torch.no_grad():
            bias.zero_()
            bias[indices] = -40
    train(body, images(3), tmp_path, hook)
    for name, indices in dead.items():
        layer = hook.results['layers'][f'body.{name}']
        assert layer['dead_channels'] == layer['near_channels'] == indices
        assert layer['scalars']['dead'] == len(indices) / CHANNELS
    assert hook.results['network']['dead'] == 2 / 16
    norm = hook.results['layers']['body.norm']
    assert norm['margin'].argsort()[:2].sort()[0].tolist() == [1, 6]


def test_constant_channels(tmp_path):
    """No variance: a margin beyond all others, of the mean's sign."""
    norm = nn.GroupNorm(2, CHANNELS)
    with torch.no_grad():
        norm.weight[:3] = 0
        norm.bias[:3] = torch.tensor([-1.0, 0.0, 1.0])
    hook = EliminationSingularityHook(interval=1, window=1)
    body = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), norm, nn.ReLU())
    train(body, images(1), tmp_path, hook)
    layer = hook.results['layers']['body.1']
    assert layer['margin'][:3].tolist() == [-100, 0, 100]
    assert layer['dead_channels'] == layer['near_channels'] == [0, 1]


@pytest.mark.parametrize('kind', ['BN', 'GN', 'BCN'])
def test_a_step_that_is_not_finite_is_left_out(kind, tmp_path):
    class Overflow(nn.Module):
        """The third step's second channel overflows before the norm."""

        def __init__(self):
            super().__init__()
            self.norm, self.steps, self.kept = NORMS[kind](8), 0, []

        def forward(self, x):
            self.steps += 1
            x = torch.cat([x, x.flip(1), x[:, :2]], dim=1)
            if self.steps == 3:
                x[0, 1, 0, 0] = float('inf')
            y = self.norm(x)
            self.kept.append((x.clone(), y.detach().clone()))
            return F.relu(y)

    hook = EliminationSingularityHook(interval=4, window=4)
    body = Overflow()
    train(body, images(4), tmp_path, hook)
    # the step has made weights NaN, and what they touch later with them
    layer = hook.results['layers']['body.norm']
    ok = [
        c
        for c in range(CHANNELS)
        if all(channels(y)[c].isfinite().all() for _, y in body.kept)
    ]
    broken = [c for c in range(CHANNELS) if c not in ok]
    assert 1 in broken and ok
    finite = [channels(y) for _, y in body.kept[:2]]
    for c in broken:
        values = torch.cat([y[c] for y in finite])
        if channels(body.kept[3][1])[c].isfinite().all():
            values = torch.cat([values, channels(body.kept[3][1])[c]])
        want = values.mean() / values.std(correction=0)
        torch.testing.assert_close(layer['margin'][c], want, atol=1e-5, rtol=1e-5)
    assert layer['margin'].isfinite().all()
    if kind == 'BCN':
        assert layer['lag'].isfinite().all()


@pytest.mark.parametrize('way', ['nan', 'inf', 'plain', 'fed'])
@pytest.mark.parametrize('kind', NORMS)
def test_why_nothing_is_measured(kind, way, tmp_path):
    hook = EliminationSingularityHook(interval=1, window=1)
    train(Broken(kind, way), images(1), tmp_path, hook)
    want = dict(plain='no norm has fed a ReLU', fed='')
    assert warning_in(tmp_path) == want.get(way, 'were finite')
    assert (hook.results is None) == (way != 'fed')
