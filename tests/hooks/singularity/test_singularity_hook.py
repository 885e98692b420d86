"""That the hook changes nothing, and leaves nothing behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from support.singularity import NORMS, Kept, Net, images, train

from bcn_mm import EliminationSingularityHook


def mask_rcnn(**kwargs):
    """The quickstart's model and two batches of random pictures."""
    cfg = Config.fromfile(ROOT / 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py')
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
        train(own, copy.deepcopy(batches), tmp_path, *hooks, randomness=dict(seed=3))
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


def compile_in_place(model):
    model.body.head.compile(backend='eager')


def compile_wrapped(model):
    model.body.head = torch.compile(model.body.head, backend='eager')


def compile_step(model):  # as mmengine does for compile=True
    model.train_step = torch.compile(model.train_step, backend='eager')


@pytest.mark.parametrize('way', [compile_in_place, compile_wrapped, compile_step])
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
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
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
