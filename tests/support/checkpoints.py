"""Checkpoints, good and evil, and backbones that load them."""

import contextlib
import logging
import re
from collections import OrderedDict

import torch
from mmdet.models.backbones import ResNet
from mmengine.logging import MMLogger
from support import authors


class Evil:
    """What a stranger's checkpoint may hold."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def small(state):
    """One number in place of each tensor, so that files are small."""
    return OrderedDict(
        (k, v.flatten()[:1].squeeze(0).clone().expand(v.shape))
        for k, v in state.items()
    )


# -- changes of a state dict, in place ----------------------------------------


def put(name, value):
    def change(state):
        state[name] = value(state[name]) if callable(value) else value

    return change


def fill(number):
    return lambda value: torch.full_like(value, number)


def shape(*sizes):
    return lambda value: torch.ones(()).expand(sizes)


def drop(*names):
    def change(state):
        for name in names:
            del state[name]

    return change


def rename(pattern, new):
    def change(state):
        for name in list(state):
            state[re.sub(pattern, new, name)] = state.pop(name)

    return change


def instead(make):
    """Another state altogether."""

    def change(state):
        new = make()
        state.clear()
        state.update(new)

    return change


# -- backbones, and files that they load --------------------------------------


def save(path, value):
    torch.save(value, path)
    return str(path)


@contextlib.contextmanager
def logged_lines():
    """The lines that mmengine's current logger is given."""
    lines = []

    class Records(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    MMLogger.get_instance('test_checkpoints')
    logger = MMLogger.get_current_instance()
    records = Records(logging.INFO)
    logger.addHandler(records)
    try:
        yield lines
    finally:
        logger.removeHandler(records)


def backbone(kind=ResNet, dialect='var', checkpoint=None, prefix=None, **more):
    more.setdefault('norm_cfg', dict(type='BCN', num_groups=32))
    if dialect:
        more['conv_cfg'] = dict(type='WSConv2d', dialect=dialect)
    if checkpoint:
        more['init_cfg'] = dict(
            type='Pretrained', checkpoint=str(checkpoint), prefix=prefix
        )
    net = kind(norm_eval=False, **more)
    if checkpoint:
        net.init_weights()
    net.eval()  # mmdet's returns nothing
    return net


def resnet18(norm='BCN', **kwargs):
    net = backbone(depth=18, norm_cfg=dict(type=norm), **kwargs)
    return authors.randomize(net)


def assert_close(got, want, tolerance=1e-8):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
