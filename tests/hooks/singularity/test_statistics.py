"""What EliminationSingularityHook counts, and that it changes nothing."""

import contextlib
import copy
import json
import os
import runpy
import uuid
from types import SimpleNamespace

import cv2
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from bcn_mm import BCN, EliminationSingularityHook
from bcn_mm.hooks.singularity import draw_history

TOOL = 'tools/analysis_tools/plot_singularity.py'
NORMS = {
    'BN': nn.BatchNorm2d,
    'SyncBN': nn.SyncBatchNorm,
    'GN': lambda c: nn.GroupNorm(2, c),
    'BCN': lambda c: BCN(c, 2),
    'BCN large-batch': lambda c: BCN(c, 2, estimate=False),
}
CHANNELS = 8


class Net(BaseModel):
    """What a runner trains; ``body`` maps a batch to some tensor."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.body(inputs).square().mean())


def train(body, batches, folder, *hooks, **kwargs):
    """A real run, one step per batch; returns the runner."""
    model = body if isinstance(body, BaseModel) else Net(body)
    runner = Runner(
        model,
        work_dir=str(folder),
        train_dataloader=DataLoader(
            [dict(inputs=b) if torch.is_tensor(b) else b for b in batches],
            collate_fn=lambda batch: batch[0],
        ),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=dict(by_epoch=False, max_iters=len(batches)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=list(hooks),
        experiment_name=uuid.uuid4().hex,
        **kwargs,
    )
    runner.train()
    return runner


def images(steps, n=2, size=6, scale=1.0):
    torch.manual_seed(0)
    return [torch.randn(n, 3, size, size) * scale for _ in range(steps)]


class Ways(nn.Module):
    """Ways from a norm to a ReLU, and some that end elsewhere."""

    YES = (
        'module', 'inplace', 'function', 'torch', 'method',
        'method_inplace', 'relu6', 'hardtanh', 'identity', 'both', 'keyword',
    )  # fmt: skip
    NO = (
        'leaky', 'tanh', 'sum', 'sum_inplace', 'scaled_inplace', 'pooled',
        'nothing', 'unused',
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        # not in the order of their names, nor in that in which they run
        self.norms = nn.ModuleDict(
            {k: nn.BatchNorm2d(CHANNELS) for k in sorted(self.YES + self.NO)}
        )
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.relu6, self.identity = nn.ReLU6(inplace=True), nn.Identity()

    def forward(self, x):
        x = self.conv(x)
        n = self.norms
        y = self.relu(n['module'](x)) + self.inplace(n['inplace'](x))
        y = y + F.relu(n['function'](x)) + torch.relu(n['torch'](x))
        y = y + n['method'](x).relu() + n['method_inplace'](x).relu_()
        y = y + self.relu6(n['relu6'](x)) + F.hardtanh(n['hardtanh'](x), 0, 3)
        y = y + F.relu(self.identity(n['identity'](x)))
        both = n['both'](x)
        y = y + both + F.relu(both) + F.relu(n['keyword'](input=x))
        y = y + F.leaky_relu(n['leaky'](x)) + F.hardtanh(n['tanh'](x))
        y = y + F.relu(n['sum'](x) + x)
        total = n['sum_inplace'](x)
        total += x
        y = y + self.inplace(total)
        scaled = n['scaled_inplace'](x)
        y = y + F.relu(scaled.mul_(2))
        y = y + F.relu(F.max_pool2d(n['pooled'](x), 3, 1, 1))
        return y + n['nothing'](x)


def test_which_norms_count(tmp_path):
    hook = EliminationSingularityHook(interval=2, window=2)
    train(Ways(), images(4), tmp_path, hook)
    want = [f'body.norms.{name}' for name in Ways.YES]
    assert list(hook.results['layers']) == want


class Kept(nn.Module):
    """Keeps what its norms take and put out, for tests to compute from.

    ``norm`` runs once, ``head`` on two sizes, of which the larger one may be
    checkpointed.
    """

    def __init__(self, make, offset=0.0, levels=False, cp=None, amp=False):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        nn.init.constant_(self.conv.bias, offset)
        self.norm = make(CHANNELS)
        self.head = BCN(CHANNELS, 2, num_levels=2) if levels else make(8)
        for norm in (self.norm, self.head):
            bias = norm.batch_bias if isinstance(norm, BCN) else norm.bias
            nn.init.uniform_(bias, -1.5, 1)
            if isinstance(norm, BCN):
                nn.init.constant_(norm.running_mean, offset)
        self.cp, self.amp, self.shift = cp, amp, offset / 2
        self.kept = dict(norm=[], head=[])
        self.hooks = []

    def run(self, name, x):
        # counted by the norm itself, not in the graph, and not twice
        y = getattr(self, name)(x)
        if torch._C._current_graph_task_id() == -1:
            self.kept[name].append((x.detach().clone(), y.detach().clone()))
        return F.relu_(y)

    def forward(self, x):
        self.hooks.append(
            sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks)
                for m in self.modules()
            )
            + torch._C._len_torch_function_stack()
        )
        amp = contextlib.nullcontext()
        if self.amp:
            amp = torch.autocast('cpu', torch.bfloat16)
        with amp:
            x = self.conv(x)
            first = self.run('norm', x)
            if self.cp is None:
                y = self.run('head', x)
            else:
                y = checkpoint(self.run, 'head', x, use_reentrant=self.cp)
            z = self.run('head', 1.5 * x[:, :, ::2, ::2] - self.shift)
        return sum(t.float().mean() for t in (first, y, z))


def channels(x):
    """(C, positions), in float64."""
    return x.double().transpose(0, 1).flatten(1)


def check(layer, kept, estimates=(), dead=0.001, near=-2.0, close=1e-5):
    """Compare a layer's result with one computed from the tensors.

    Args:
        layer (dict): The result.
        kept (list): Inputs and outputs of all calls of the window.
        estimates (list): For each level of a BCN, mean and variance.
    """
    values = torch.cat([channels(y) for _, y in kept], 1)
    rate = (values > 0).double().mean(1)
    margin = values.mean(1) / values.std(1, correction=0)
    tolerance = dict(rtol=close, atol=close)
    torch.testing.assert_close(layer['rate'], rate, **tolerance)
    torch.testing.assert_close(layer['margin'], margin, **tolerance)
    dead = (rate < dead).nonzero().flatten().tolist()
    near = [c for c in range(CHANNELS) if c in dead or margin[c] < near]
    assert layer['dead_channels'] == dead and layer['near_channels'] == near
    scalars = layer['scalars']
    assert scalars['dead'] == len(dead) / CHANNELS
    assert scalars['near'] == len(near) / CHANNELS
    assert scalars['margin_min'] == layer['margin'].min()
    assert scalars['margin_median'] == layer['margin'].median()
    assert ('lag' in scalars) == bool(estimates)
    for level, (mu, sigma2) in enumerate(estimates):
        # every call weighs the same, whatever its size
        calls = [channels(x) for x, _ in kept[level :: len(estimates)]]
        calls = [x for x in calls if x.numel()]
        mean = torch.stack([x.mean(1) for x in calls]).mean(0)
        spread = [(x - mean[:, None]).square().mean(1) for x in calls]
        var = torch.stack(spread).mean(0)
        lag = (mu.double() - mean).abs() / var.sqrt()
        torch.testing.assert_close(layer['lag'][level], lag, **tolerance)
        torch.testing.assert_close(
            layer['var_ratio'][level], sigma2.double() / var, **tolerance
        )
    if estimates:
        assert scalars['lag'] == layer['lag'].median()
        assert scalars['lag_max'] == layer['lag'].max()
        assert scalars['var_ratio'] == layer['var_ratio'].median()


def estimates_of(norm):
    if not isinstance(norm, BCN):
        return []
    pair = norm.running_mean, norm.running_var
    if norm.num_levels == 1:
        return [pair]
    return list(zip(*pair))


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
        torch.testing.assert_close(layer['margin'][c], want, atol=1e-5,
                                   rtol=1e-5)  # fmt: skip
    assert layer['margin'].isfinite().all()
    if kind == 'BCN':
        assert layer['lag'].isfinite().all()


def mask_rcnn(**kwargs):
    """The quickstart's model and two batches of random pictures."""
    cfg = Config.fromfile(
        ROOT / 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py'
    )
    cfg.merge_from_dict(kwargs)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model, cfg


def pictures(cfg, steps):
    from mmdet.testing import demo_mm_inputs

    batches = []
    for _ in range(steps):
        batch = demo_mm_inputs(
            1, [(3, 64, 64)], num_items=[3], num_classes=3, with_mask=True
        )
        for sample in batch['data_samples']:
            sample.gt_instances.labels %= 3
        batches.append(batch)
    return batches


@pytest.mark.parametrize('with_cp', [False, True])
def test_weights_are_those_without_the_hook(with_cp, tmp_path):
    hook = EliminationSingularityHook(interval=2, window=1)
    model, cfg = mask_rcnn(**{'model.backbone.with_cp': with_cp})
    torch.manual_seed(1)
    batches = pictures(cfg, 4)
    states, generators = [], []
    for hooks in ([], [hook]):
        torch.manual_seed(2)
        own = copy.deepcopy(model)
        train(own, copy.deepcopy(batches), tmp_path, *hooks,
              randomness=dict(seed=3))  # fmt: skip
        states.append(own.state_dict())
        generators.append(torch.get_rng_state())
    assert torch.equal(*generators)
    before = model.state_dict()
    assert any(not torch.equal(before[k], v) for k, v in states[0].items())
    assert all(torch.equal(states[1][k], v) for k, v in states[0].items())
    layers = list(hook.results['layers'])
    # of a block of ResNet-18 only the first norm feeds a ReLU
    assert [name for name in layers if 'backbone' in name] == [
        'backbone.bn1',
        *(f'backbone.layer{s}.{b}.bn1' for s in range(1, 5) for b in (0, 1)),
    ]
    assert not any('neck' in name for name in layers)
    heads = [name for name in layers if 'roi_head' in name]
    assert len(heads) == 8 and layers == sorted(
        layers, key=lambda name: ('mask' in name, 'roi' in name)
    )


def test_frozen_layers_and_segmenters(tmp_path):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = Config.fromfile(
        ROOT / 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py'
    )
    cfg.model.backbone.frozen_stages = 1
    cfg.model.data_preprocessor.pop('size', None)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    hook = EliminationSingularityHook(interval=1, window=1)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(3, (1, 32, 32))),
        metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32)),
    )
    batch = dict(inputs=[torch.randn(3, 32, 32)], data_samples=[sample])
    train(model, [batch], tmp_path, hook)
    layers = hook.results['layers']
    assert not model.backbone.layer1.training
    assert 'backbone.layer1.0.bn1' in layers
    assert any(name.startswith('decode_head') for name in layers)
    assert not any(name.endswith('layer1.0.bn2') for name in layers)


class Scheduled(nn.Module):
    """Norms that run in some steps, and feed a ReLU in some of these.

    The schedule is drawn anew for each seed and rank; the last norm never
    runs.
    """

    WAYS = ('absent', 'plain', 'fed', 'both', 'empty')

    def __init__(self, seed, rank=0, steps=12):
        super().__init__()
        torch.manual_seed(0)
        kinds = ['BN', 'GN', 'BCN', 'GN', 'BCN', 'GN']
        self.norms = nn.ModuleList(NORMS[kind](CHANNELS) for kind in kinds)
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        generator = torch.Generator().manual_seed(100 * seed + rank)
        ways = torch.randint(5, (steps, len(kinds)), generator=generator)
        ways[:, -1] = 0
        self.schedule = [[self.WAYS[i] for i in row] for row in ways]
        self.kept = [[[] for _ in kinds] for _ in range(steps)]
        self.steps = 0

    def forward(self, x):
        x = self.conv(x)
        y = sum(0 * p.sum() for p in self.parameters()) + x.mean()
        step, self.steps = self.steps, self.steps + 1
        for i, way in enumerate(self.schedule[step]):
            if way == 'absent':
                continue
            norm = self.norms[i]
            if way == 'empty':  # as a head without a region
                if isinstance(norm, nn.BatchNorm2d):
                    continue
                y = y + F.relu(norm(x[:0])).sum()
                continue
            if way in ('plain', 'both'):
                y = y + self.run(step, i, x).mean()
            if way in ('fed', 'both'):
                y = y + F.relu(self.run(step, i, 2 * x + 1)).mean()
        return y

    def run(self, step, i, x):
        z = self.norms[i](x)
        self.kept[step][i].append((x.detach().clone(), z.detach().clone()))
        return z

    def counting(self, steps):
        """The calls of each norm that counts in the window of these steps."""
        counting = {}
        for i in range(len(self.norms)):
            ways = [self.schedule[step][i] for step in steps]
            if isinstance(self.norms[i], nn.BatchNorm2d):
                ways = [w for w in ways if w != 'empty']
            first = next((w for w in ways if w != 'absent'), 'absent')
            if first in ('fed', 'both', 'empty'):
                counting[i] = [c for t in steps for c in self.kept[t][i]]
        return counting


class Results(Hook):
    """Keeps what each window leaves behind."""

    priority = 'LOWEST'

    def __init__(self, hook, body):
        self.hook, self.body, self.seen = hook, body, []

    def after_train_iter(self, runner, *args, **kwargs):
        if (runner.iter + 1) % self.hook.interval == 0:
            norms = copy.deepcopy(self.body.norms)
            results = copy.deepcopy(self.hook.results)
            self.seen.append((results, norms))


@pytest.mark.parametrize('seed', range(8))
def test_a_norm_is_seen_whenever_it_first_runs(seed, tmp_path):
    """In any step of a window, though another never runs, and though in
    later steps, or in other windows, its output goes elsewhere."""
    interval, window = ((4, 3), (3, 3), (6, 4), (4, 1))[seed % 4]
    hook = EliminationSingularityHook(interval=interval, window=window)
    body = Scheduled(seed)
    look = Results(hook, body)
    train(body, images(12), tmp_path, hook, look)
    for i, (results, norms) in enumerate(look.seen, 1):
        end = i * interval
        calls = body.counting(range(end - window, end))
        calls = {i: kept for i, kept in calls.items() if kept}
        if not calls:
            assert results is None or results['step'] < end
            continue
        names = {f'body.norms.{i}' for i in calls}
        assert results['step'] == end and set(results['layers']) == names
        for i, kept in calls.items():
            layer = results['layers'][f'body.norms.{i}']
            check(layer, kept, estimates_of(norms[i]))


def run_scheduled(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    results = []
    for seed in range(4):
        hook = EliminationSingularityHook(interval=4, window=4)
        body = Scheduled(seed, rank, steps=4)
        train(body, images(4, n=1 + rank), f'{folder}/{seed}', hook, **GLOO)
        layers = {
            name: {k: v for k, v in layer.items() if k in ('rate', 'margin')}
            for name, layer in hook.results['layers'].items()
        }
        results.append((layers, body.counting(range(4))))
    return results


def test_each_rank_sees_its_own(tmp_path):
    """A norm counts with the calls of those ranks on which it counts."""
    for ranks in zip(*on_ranks(2, run_scheduled, str(tmp_path))):
        calls = {}
        for _, own in ranks:
            for i, kept in own.items():
                calls.setdefault(f'body.norms.{i}', []).extend(kept)
        calls = {name: kept for name, kept in calls.items() if kept}
        for layers, _ in ranks:
            assert set(layers) == set(calls)
            for name, layer in layers.items():
                values = torch.cat([channels(y) for _, y in calls[name]], 1)
                rate = (values > 0).double().mean(1)
                margin = values.mean(1) / values.std(1, correction=0)
                close = dict(rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(layer['rate'], rate, **close)
                torch.testing.assert_close(layer['margin'], margin, **close)


class Broken(nn.Module):
    """Ways in which nothing is measured: nothing finite, or nothing fed."""

    def __init__(self, kind, way):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 3), NORMS[kind](CHANNELS)
        self.way = way

    def forward(self, x):
        x = self.conv(x)
        if self.way not in ('plain', 'fed'):
            x = x * float(self.way)
        x = self.norm(x)
        return x if self.way == 'plain' else F.relu(x)


def warning_in(folder):
    text = ''.join(path.read_text() for path in folder.rglob('*.log'))
    reasons = ('were finite', 'no norm has fed a ReLU')
    return ' and '.join(reason for reason in reasons if reason in text)


@pytest.mark.parametrize('way', ['nan', 'inf', 'plain', 'fed'])
@pytest.mark.parametrize('kind', NORMS)
def test_why_nothing_is_measured(kind, way, tmp_path):
    hook = EliminationSingularityHook(interval=1, window=1)
    train(Broken(kind, way), images(1), tmp_path, hook)
    want = dict(plain='no norm has fed a ReLU', fed='')
    assert warning_in(tmp_path) == want.get(way, 'were finite')
    assert (hook.results is None) == (way != 'fed')


WAYS_OF_RANKS = [
    ('nan', 'inf', 'were finite'),
    ('plain', 'nan', 'were finite'),
    ('nan', 'plain', 'were finite'),
    ('plain', 'plain', 'no norm has fed a ReLU'),
    ('fed', 'nan', ''),
    ('nan', 'fed', ''),
]


def run_broken(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    for i, ways in enumerate(WAYS_OF_RANKS):
        hook = EliminationSingularityHook(interval=1, window=1)
        body = Broken('GN', ways[rank])
        train(body, images(1), f'{folder}/{i}', hook, **GLOO)


def test_why_nothing_is_measured_on_ranks(tmp_path):
    on_ranks(2, run_broken, str(tmp_path))
    for i, (*_, want) in enumerate(WAYS_OF_RANKS):
        assert warning_in(tmp_path / f'{i}') == want


# how several ranks train without a GPU
GLOO = dict(
    launcher='pytorch',
    cfg=dict(
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
        )
    ),
    env_cfg=dict(dist_cfg=dict(backend='gloo')),
)


class OnRanks(nn.Module):
    """Rank 0 has nothing for the head until the last step."""

    def __init__(self, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.body = Kept(NORMS['BCN'])
        self.late = nn.GroupNorm(2, CHANNELS)
        self.rank, self.steps, self.kept = rank, 0, []

    def forward(self, x):
        self.steps += 1
        y = self.body(x)
        if self.rank == 0 and self.steps < 3:
            return y + sum(0 * p.sum() for p in self.late.parameters())
        z = self.late(self.body.conv(x))
        self.kept.append((torch.zeros(0), z.detach().clone()))
        return y + F.relu(z).mean()


def run_rank(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)  # as launchers do
    hook = EliminationSingularityHook(interval=3, window=3)
    body = OnRanks(rank)
    batches = [
        b + rank for b in images(3, n=1 + rank, size=6 + rank, scale=1 + rank)
    ]
    runner = train(
        body,
        batches,
        folder,
        hook,
        **GLOO,
    )
    assert type(runner.model).__name__ == 'MMDistributedDataParallel'
    return dict(
        results=hook.results,
        kept=dict(
            body_norm=body.body.kept['norm'],
            body_head=body.body.kept['head'],
            late=body.kept,
        ),
        estimates=[
            (norm.running_mean, norm.running_var)
            for norm in (body.body.norm, body.body.head)
        ],
        history=len(hook.history),
    )


def test_numbers_are_those_of_all_ranks(tmp_path):
    ranks = on_ranks(2, run_rank, str(tmp_path))
    first, second = (rank['results'] for rank in ranks)
    layers = first['layers']
    assert sorted(layers) == ['body.body.head', 'body.body.norm', 'body.late']
    kept = [rank['kept'] for rank in ranks]
    for i, name in enumerate(('norm', 'head')):
        calls = kept[0][f'body_{name}'] + kept[1][f'body_{name}']
        mean, var = (
            torch.stack([rank['estimates'][i][k] for rank in ranks]).double()
            for k in (0, 1)
        )
        mixture = var.mean(0) + mean.var(0, correction=0)
        check(layers[f'body.body.{name}'], calls, [(mean.mean(0), mixture)])
    check(layers['body.late'], kept[0]['late'] + kept[1]['late'])
    # both ranks have them, the first one logs
    assert [rank['history'] for rank in ranks] == [1, 0]
    for name, layer in second['layers'].items():
        torch.testing.assert_close(layer, layers[name], rtol=0, atol=0)
    assert len(list(tmp_path.rglob('scalars.json'))) == 1


def logged(folder):
    (path,) = folder.rglob('scalars.json')
    lines = map(json.loads, path.read_text().splitlines())
    return path, [line for line in lines if 'singularity/dead' in line]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folders of a run with dead channels and of one without."""
    folders = []
    for name, bias in (('healthy', 0.0), ('ill', -40.0)):
        folder = tmp_path_factory.mktemp('runs') / name
        torch.manual_seed(0)
        body = Kept(NORMS['BCN'])
        with torch.no_grad():
            for norm in (body.norm, body.head):
                norm.batch_bias.zero_()
            body.head.batch_bias[:3] = bias
        hook = EliminationSingularityHook(interval=2, window=1)
        train(body, images(7), folder, hook)
        folders.append((folder, hook))
    return folders


def test_what_is_logged(runs, capsys):
    for folder, hook in runs:
        path, lines = logged(folder)
        assert [line['step'] for line in lines] == [2, 4, 6]
        results, line = hook.results, lines[-1]
        assert {k: v for k, v in line.items() if k.count('/') == 1} == {
            f'singularity/{k}': v for k, v in results['network'].items()
        }
        for name, layer in results['layers'].items():
            for key, value in layer['scalars'].items():
                assert line[f'singularity/{name}/{key}'] == value
        text = next(folder.glob('*/*.log')).read_text()
        dead = sum(len(v['dead_channels']) for v in results['layers'].values())
        assert f'steps 6 to 6: of 16 channels {dead} dead' in text
        assert str(path.with_name('singularity.png')) in text
    assert [hook.results['network']['dead'] for _, hook in runs] == [0, 3 / 16]


@pytest.fixture
def plot(monkeypatch, capsys):
    """Run the tool; what it printed."""

    def call(*words):
        monkeypatch.setattr('sys.argv', [TOOL, *map(str, words)])
        runpy.run_path(str(ROOT / TOOL), run_name='__main__')
        return capsys.readouterr().out

    return call


def test_plot_is_the_hooks_own(runs, tmp_path, plot):
    for folder, _ in runs:
        path, _ = logged(folder)
        own = path.with_name('singularity.png')
        assert cv2.imread(str(own)).shape[1] == 900
        out = tmp_path / 'sub' / 'one.png'
        assert plot(folder, '--out', out).strip() == str(out)
        assert out.read_bytes() == own.read_bytes()
        assert not list(out.parent.glob('*.part*'))
        # a line that is just being written
        with open(path, 'a') as file:
            file.write('{"singularity/dead": 0.0, "singul')
        plot(path, '--out', out)
        assert out.read_bytes() == own.read_bytes()
    both = tmp_path / 'both.png'
    plot(*(folder for folder, _ in runs), '--out', both)
    pair = cv2.imread(str(both))
    assert pair.shape[1] == 900 and pair.shape[0] > 300


def test_plot_shows_the_numbers(tmp_path):
    """Colours of the cells follow the dead fraction, layer by layer."""

    def drawn(dead, name):
        tags = {'singularity/dead': 0.5}
        for layer, value in zip('ab', dead):
            tags[f'singularity/{layer}/dead'] = value
            tags[f'singularity/{layer}/margin_min'] = -1.0
        path = tmp_path / f'{name}.png'
        draw_history({'': [(50, tags)]}, str(path))
        picture = cv2.imread(str(path)).astype(int)
        height, width = picture.shape[:2]
        right = picture[:, int(width * 0.75)]
        return right[int(height * 0.3)].sum(), right[int(height * 0.6)].sum()

    top, bottom = drawn((0.0, 1.0), 'down')
    assert top > 600 and bottom < 100  # light, dark
    assert drawn((1.0, 0.0), 'up') == (bottom, top)


def test_layers_of_other_norms_share_a_row(tmp_path):
    def differ(*names):
        keys = ('dead', 'margin_min')
        runs = {
            name: [(50, {f'singularity/{name}/{key}': 0.0 for key in keys})]
            for name in names
        }
        path = tmp_path / 'rows.png'
        draw_history(runs, str(path))
        grey = (cv2.imread(str(path)) == 211).all(2).mean()
        return grey > 0.05

    assert not differ('a.bn1', 'a.gn1') and not differ('a.gn', 'a.bn')
    assert differ('a.bn1', 'a.gn2') and differ('a.0', 'a.1')


def test_plot_errors(runs, tmp_path, refused):
    (folder, _), _ = runs
    assert 'no file or folder' in refused(TOOL, tmp_path / 'none')
    assert 'no vis_data/scalars.json' in refused(TOOL, tmp_path)
    log = tmp_path / 'scalars.json'
    log.write_text('{"loss": 1.0, "step": 1}\n')
    assert 'nothing of EliminationSingularityHook' in refused(TOOL, log)
    log.write_text('{"singularity/dead" 0.0}\n{"loss": 1.0}\n')
    assert 'line 1, is damaged' in refused(TOOL, log)
    assert 'as many different --labels' in refused(
        TOOL, folder, folder, '--labels', 'a'
    )
    assert 'as many different --labels' in refused(TOOL, folder, folder)
    assert 'does not end in .png' in refused(TOOL, folder, '--out', 'a.jpg')


def test_a_step_that_fails_leaves_nothing(tmp_path):
    class Broken(Kept):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError('out of memory')

    body = Broken(NORMS['GN'])
    hook = EliminationSingularityHook(interval=1, window=1)
    with pytest.raises(RuntimeError, match='out of memory'):
        train(body, images(1), tmp_path, hook)
    assert body.hooks[0] > 0  # it was measuring
    assert torch._C._len_torch_function_stack() == 0
    assert not any(m._forward_hooks for m in body.modules())


def test_validation_is_not_measured(tmp_path):
    """Neither by the window around it, nor does it see any hook."""
    body = Kept(NORMS['GN'])

    class Validate(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            runner.model(torch.randn(2, 3, 6, 6) * 9 + 7)

    hook = EliminationSingularityHook(interval=2, window=2)
    train(body, images(2), tmp_path, hook, Validate())
    assert [n > 0 for n in body.hooks] == [True, False, True, False]
    check(hook.results['layers']['body.norm'], body.kept['norm'][::2])


def test_resumed_within_a_window(tmp_path):
    """What is left of the window is measured."""
    body = Kept(NORMS['GN'])

    class Resume(Hook):
        priority = 'VERY_HIGH'

        def before_train(self, runner):
            runner.train_loop._iter = 3

    hook = EliminationSingularityHook(interval=4, window=3)
    train(body, images(5), tmp_path, hook, Resume())
    assert hook.results['step'] == 4 and len(body.kept['norm']) == 2
    check(hook.results['layers']['body.norm'], body.kept['norm'][:1])


def compile_in_place(model):
    model.body.head.compile(backend='eager')


def compile_wrapped(model):
    model.body.head = torch.compile(model.body.head, backend='eager')


def compile_step(model):  # as mmengine does for compile=True
    model.train_step = torch.compile(model.train_step, backend='eager')


@pytest.mark.parametrize(
    'way', [compile_in_place, compile_wrapped, compile_step]
)
def test_compiled_models_are_left_alone(way, tmp_path):
    hook = EliminationSingularityHook(interval=1, window=1)
    model = Net(Kept(NORMS['GN']))
    way(model)
    warnings = []
    runner = SimpleNamespace(
        model=model, iter=0, logger=SimpleNamespace(warning=warnings.append)
    )
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    (warning,) = warnings
    assert 'torch.compile hides' in warning
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    assert hook.results is None


@pytest.mark.parametrize(
    'kwargs, name',
    [
        (dict(interval=0), 'interval=0'),
        (dict(window=0), 'window=0'),
        (dict(interval=4, window=5), 'window=5'),
        (dict(dead_below=0), 'dead_below'),
        (dict(dead_below=1.5), 'dead_below'),
        (dict(near_below=0.5), 'near_below'),
        (dict(near_below=float('nan')), 'near_below'),
    ],
)
def test_arguments(kwargs, name):
    with pytest.raises(ValueError, match=name) as error:
        EliminationSingularityHook(**kwargs)
    assert '\n' not in str(error.value)
