"""Which norms and which calls count."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from support.singularity import (
    CHANNELS,
    NORMS,
    Kept,
    Scheduled,
    check,
    estimates_of,
    images,
    train,
)
from torch import nn

from bcn_mm import EliminationSingularityHook


class Ways(nn.Module):
    """Ways from a norm to a ReLU, and some that end elsewhere."""

    YES = (
        'module',
        'inplace',
        'function',
        'torch',
        'method',
        'method_inplace',
        'relu6',
        'hardtanh',
        'identity',
        'both',
        'keyword',
        'named',
    )
    NO = (
        'leaky',
        'tanh',
        'sum',
        'sum_inplace',
        'scaled_inplace',
        'pooled',
        'nothing',
        'unused',
    )

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
        y = y + F.hardtanh_(n['tanh'](x)) + F.hardtanh_(x.clone())
        y = y + F.hardtanh_(n['named'](x), max_val=6.0, min_val=0.0)
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
    record = Results(hook, body)
    train(body, images(12), tmp_path, hook, record)
    for i, (results, norms) in enumerate(record.seen, 1):
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


def test_frozen_layers_and_segmenters(tmp_path):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = Config.fromfile(ROOT / 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py')
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
