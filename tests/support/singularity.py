"""Models and runs for EliminationSingularityHook, and what it must find."""

import contextlib
import uuid

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from bcn_mm import BCN

NORMS = {
    'BN': nn.BatchNorm2d,
    'SyncBN': nn.SyncBatchNorm,
    'GN': lambda c: nn.GroupNorm(2, c),
    'BCN': lambda c: BCN(c, 2),
    'BCN large-batch': lambda c: BCN(c, 2, estimate=False),
}
CHANNELS = 8
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
