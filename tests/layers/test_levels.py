"""One BCN shared by pyramid levels keeps an estimate for each of them."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.registry import init_default_scope
from support.levels import (
    SIZES,
    Head,
    assert_equal_estimates,
    pyramid,
    separate,
    shared,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from bcn_mm import BCN
from bcn_mm.layers.levels import one_pass


@pytest.mark.parametrize('estimate', [True, False])
@given(
    sizes=st.lists(
        st.tuples(*[st.integers(1, 9)] * 5).map(lambda s: sorted(s, reverse=True)),
        min_size=3,
        max_size=3,
    ),
    momentum=st.sampled_from([0.3, None]),
)
def test_is_one_layer_per_level_with_shared_parameters(estimate, sizes, momentum):
    layer = shared(estimate=estimate, momentum=momentum)
    layers = separate(layer)
    for step in sizes:
        x = pyramid(step)
        got = [layer(t) for t in x]
        want = [one(t) for one, t in zip(layers, x)]
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        grads = [
            torch.autograd.grad(
                sum(y.pow(3).sum() for y in outs), list(layer.parameters())
            )
            for outs in (got, want)
        ]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert_equal_estimates(layer, layers)
    layer.eval(), [one.eval() for one in layers]
    for step in sizes:
        x = pyramid(step)
        for one, t in zip(layers, x):
            torch.testing.assert_close(layer(t), one(t), rtol=0, atol=0)


def test_fewer_levels_and_changes_of_mode():
    layer = shared()
    layers = separate(layer)
    for sizes in ((8, 4, 2), SIZES, (6, 3), (4,)):
        for t, one in zip(pyramid(sizes), layers):
            torch.testing.assert_close(layer(t), one(t), rtol=0, atol=0)
        layer.train(), [one.train() for one in layers]
    assert_equal_estimates(layer, layers)


@pytest.mark.parametrize('broken', range(1, 5))
@pytest.mark.parametrize('training', [True, False])
def test_a_pass_that_broke_off_puts_no_other_out_of_step(broken, training):
    layer = shared()
    layers = separate(layer)
    for module in (layer, *layers):
        module.train(training)
    for t, one in list(zip(pyramid(), layers))[:broken]:
        layer(t), one(t)
    # an exception here; the next picture is larger than the last level seen
    for t, one in zip(pyramid((9, 4, 2, 1, 1)), layers):
        torch.testing.assert_close(layer(t), one(t), rtol=0, atol=0)
    assert_equal_estimates(layer, layers)


@given(
    passes=st.lists(
        st.tuples(
            st.lists(st.integers(1, 4), min_size=1, max_size=5).map(
                lambda sizes: sorted(sizes, reverse=True)
            ),
            st.booleans(),  # whether it breaks off
        ),
        min_size=2,
        max_size=6,
    ),
    wrapped=st.booleans(),
    estimate=st.booleans(),
    training=st.booleans(),
)
def test_a_pass_begins_with_the_outermost_module(passes, wrapped, estimate, training):
    """Whatever came before it, of whatever sizes, and however many levels."""
    layer = shared(estimate=estimate)
    layers = separate(layer)
    net = Head(layer)
    if wrapped:
        net = nn.Sequential(nn.Identity(), net)
    net.train(training), [one.train(training) for one in layers]
    for sizes, breaks_off in passes:
        x = pyramid(sizes)
        want = [one(t) for one, t in zip(layers, x)]
        if breaks_off:
            with pytest.raises(InterruptedError):
                net([*x, None])
        else:
            torch.testing.assert_close(net(x), want, rtol=0, atol=0)
    assert_equal_estimates(layer, layers)


def test_a_head_with_an_attribute_of_the_same_name():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(4, 8, 1), BCN(8, num_levels=3))
            self._levels = 3

        def forward(self, levels):
            return [self.tower(x) for x in levels]

    head = Head()
    for _ in range(2):
        head([torch.randn(1, 4, size, size) for size in (8, 4, 2)])
    assert head.tower[1].num_batches_tracked.tolist() == [2, 2, 2]


def test_a_head_that_is_called_twice_in_a_pass():
    layer = shared()
    layers = separate(layer)
    head = Head(layer)

    class Detector(nn.Module):
        def forward(self, x):
            return head(x), head(x)

    for sizes in (SIZES, (8, 4, 2)):
        x = pyramid(sizes)
        got = Detector()(x)
        want = tuple([o(t) for o, t in zip(layers, x)] for _ in range(2))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_passes_of_several_threads_at_once():
    layer = shared().eval()
    with torch.no_grad():
        layer.running_mean.copy_(torch.randn(5, 6))
    head = Head(layer)
    barrier = threading.Barrier(2)

    class InStep(nn.Module):
        def forward(self, x):
            barrier.wait()
            return x

    head.block[0] = InStep()
    inputs = [pyramid((4, 4, 4)), pyramid((8, 8, 8))]
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(head, inputs))
    layers = [one.eval() for one in separate(layer)]
    for one, mean, var in zip(layers, layer.running_mean, layer.running_var):
        one.running_mean.copy_(mean)
        one.running_var.copy_(var)
    for outs, x in zip(got, inputs):
        want = [one(t) for one, t in zip(layers, x)]
        torch.testing.assert_close(outs, want, rtol=0, atol=0)


def test_one_pass_for_code_outside_of_modules():
    layer = shared()
    layers = separate(layer)
    for sizes in ((4,), (4,), (4, 2), (4, 4, 2), (4,)):
        x = pyramid(sizes)
        with one_pass():
            got = [layer(t) for t in x]
        want = [one(t) for one, t in zip(layers, x)]
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert_equal_estimates(layer, layers)


@pytest.mark.parametrize('sizes', [(9, 7, 5, 3, 1), (4, 4, 4, 4, 4)])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('reentrant', [True, False])
def test_recomputation_finds_the_level(training, reentrant, sizes):
    """Backward runs through the levels in reverse."""
    conv = nn.Conv2d(6, 6, 1).double()
    layer = shared().train(training)
    with torch.no_grad():
        layer.running_mean.copy_(torch.randn(5, 6))
    x = [t.requires_grad_() for t in pyramid(sizes)]
    outcomes = []
    for wrap in (
        lambda f, t: f(t),
        lambda f, t: checkpoint(f, t, use_reentrant=reentrant),
    ):
        net = nn.Sequential(conv, copy.deepcopy(layer))
        loss = sum(wrap(net, t).pow(3).sum() for t in x)
        grads = torch.autograd.grad if not reentrant else None
        if grads:
            grads = grads(loss, [*net.parameters(), *x])
        else:
            net.zero_grad()
            [setattr(t, 'grad', None) for t in x]
            loss.backward()
            grads = [p.grad.clone() for p in (*net.parameters(), *x)]
        outcomes.append((loss, grads, list(net.buffers())))
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


def test_state_round_trip():
    layer = shared()
    [layer(t) for t in pyramid()]
    again = shared()
    again.load_state_dict(layer.state_dict())
    layer.eval(), again.eval()
    for t in pyramid():
        torch.testing.assert_close(layer(t), again(t), rtol=0, atol=0)


def test_all_levels_start_from_the_one_estimate_of_a_state():
    """...of a layer without levels, and of BatchNorm."""
    layer = shared()
    [layer(t) for t in pyramid()]
    for source in (BCN(6, 2), nn.BatchNorm2d(6)):
        source.double()(pyramid()[0])
        layer.load_state_dict(source.state_dict())
        want = source.running_mean.expand(5, 6)
        torch.testing.assert_close(layer.running_mean, want, rtol=0, atol=0)


def test_a_layer_without_levels_refuses_a_state_with_them():
    with pytest.raises(RuntimeError, match='size mismatch'):
        BCN(6, 2).load_state_dict(shared().state_dict())


def test_bad_num_levels():
    with pytest.raises(ValueError, match='num_levels must be positive'):
        BCN(6, num_levels=0)


def retinanet(num_levels):
    """A RetinaNet with norms in the head that its five levels share."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    norm = dict(type='BCN', momentum=0.2)
    return MODELS.build(
        dict(
            type='RetinaNet',
            data_preprocessor=dict(
                type='DetDataPreprocessor', mean=[128] * 3, std=[50] * 3
            ),
            backbone=dict(
                type='ResNet',
                depth=18,
                base_channels=16,
                norm_cfg=norm,
                norm_eval=False,
            ),
            neck=dict(
                type='FPN',
                in_channels=[16, 32, 64, 128],
                out_channels=16,
                start_level=1,
                add_extra_convs='on_input',
                num_outs=5,
                norm_cfg=norm,
            ),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=4,
                in_channels=16,
                stacked_convs=2,
                feat_channels=16,
                norm_cfg=dict(norm, num_levels=num_levels),
                anchor_generator=dict(
                    type='AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=[8, 16, 32, 64, 128],
                ),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            ),
            train_cfg=dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=0.5,
                    neg_iou_thr=0.4,
                    min_pos_iou=0,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type='PseudoSampler'),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            test_cfg=dict(),
        )
    )


def gap_between_training_and_evaluation(num_levels):
    """How far apart the head's scores are in both modes, once the estimates
    have converged on a picture, relative to their spread; the worst level."""
    model = retinanet(num_levels)
    with torch.no_grad():
        # untrained, the head is nearly constant
        for conv in model.bbox_head.cls_convs:
            conv.conv.weight.mul_(50)
        model.bbox_head.retina_cls.weight.mul_(50)
    data = demo_mm_inputs(1, [[3, 128, 160]], num_classes=4)
    data = model.data_preprocessor(data, True)
    for _ in range(150):
        losses = model(**data, mode='loss')
    assert torch.isfinite(sum(map(sum, losses.values())))
    outs = []
    with torch.no_grad():
        for mode in (True, False):
            features = model.train().extract_feat(data['inputs'])
            outs.append(model.bbox_head.train(mode)(features)[0])
    return max(
        float((a - b).abs().max() / a.std().clamp_min(1e-3)) for a, b in zip(*outs)
    )


def test_training_and_evaluation_of_a_retinanet_agree():
    assert gap_between_training_and_evaluation(5) < 1e-3
    # what goes wrong without
    assert gap_between_training_and_evaluation(1) > 0.1
