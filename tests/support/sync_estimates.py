"""Runs on ranks whose estimates differ, for SyncEstimatesHook."""

import os
import uuid

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from bcn_mm import BCN

ESTIMATES = ('running_mean', 'running_var', 'num_batches_tracked')


def estimates_of(state, prefix=''):
    """Of a state dict, copied and with bare names."""
    return {
        name[len(prefix) :]: value.clone()
        for name, value in state.items()
        if name.startswith(prefix) and name.endswith(ESTIMATES)
    }


class Net(BaseModel):
    """One layer runs in every step; one on rank 0 in every second only."""

    def __init__(self, make=BCN, rank=0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm, self.odd = make(4, momentum=0.3), make(4, momentum=0.3)
        self.rank, self.steps, self.validated = rank, 0, []

    def forward(self, inputs, mode='tensor'):
        x = self.norm(self.conv(inputs))
        if mode == 'predict':
            self.validated.append(estimates_of(self.state_dict()))
            return [0]
        self.steps += 1
        loss = x.square().mean()
        if self.rank or self.steps % 2:
            x = self.odd(x + self.rank)
        return dict(loss=loss + (x - 1).square().mean())

    def val_step(self, data):
        return self(**data, mode='predict')


class Score(BaseMetric):
    """The second validation is the best one."""

    scores = (1.0, 3.0, 2.0)

    def __init__(self):
        super().__init__()
        self.runs = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.runs += 1
        return dict(score=self.scores[(self.runs - 1) % 3])


class RecordEstimates(Hook):
    """Keeps a model's own estimates as each step leaves them."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.steps = []

    def after_train_iter(self, runner, *args, **kwargs):
        model = getattr(runner.model, 'module', runner.model)
        self.steps.append(estimates_of(model.state_dict()))


def batches(rank, steps):
    generator = torch.Generator().manual_seed(1000 * rank)
    return [
        dict(
            inputs=torch.randn(1 + rank, 3, 6, 6, generator=generator) * (1 + 2 * rank)
            + rank
        )
        for _ in range(steps)
    ]


def loader(data):
    return DataLoader(data, collate_fn=lambda batch: batch[0])


def make_runner(model, rank, folder, train_cfg, data, *hooks, **kwargs):
    os.environ['LOCAL_RANK'] = str(rank)  # as launchers do
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=kwargs.pop('broadcast_buffers', False),
        find_unused_parameters=True,
    )
    checkpoint = kwargs.pop('checkpoint', None)
    return Runner(
        model,
        work_dir=folder,
        train_dataloader=data,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=train_cfg,
        default_hooks=dict(checkpoint=checkpoint),
        custom_hooks=list(hooks),
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
        experiment_name=uuid.uuid4().hex,
        **kwargs,
    )


def assert_equal(first, second):
    assert first.keys() == second.keys() and first
    assert all(torch.equal(v, second[k]) for k, v in first.items())
