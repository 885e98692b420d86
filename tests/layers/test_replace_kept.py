"""Norms that do more than normalize stay; subclasses that do not are replaced."""

import warnings

import pytest
import torch
import torch.distributed as dist
from mmcv.ops import SyncBatchNorm as MMSyncBN
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from support.norms import batch_norm
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from bcn_mm import BCN, replace_norms
from bcn_mm.layers import is_replaceable


class NormAct(nn.BatchNorm2d):
    """Made as timm's BatchNormAct2d: the activation is within."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class GroupNormTwice(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class SyncNormAct(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x).relu()


class OtherDefaults(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.03)

    def _check_input_dim(self, x):
        pass


def forward_of_its_own(channels):
    norm = nn.BatchNorm2d(channels)
    norm.forward = lambda x: x
    return norm


def pruned(channels):
    return prune.l1_unstructured(nn.BatchNorm2d(channels), 'weight', 1)


def parametrized(channels):
    return parametrizations.weight_norm(nn.GroupNorm(2, channels), dim=None)


def spectral(channels):
    norm = nn.BatchNorm2d(channels)
    norm.weight = nn.Parameter(torch.ones(channels, 1))
    return spectral_norm(norm)


DO_MORE = [
    NormAct,
    lambda channels: GroupNormTwice(2, channels),
    SyncNormAct,
    forward_of_its_own,
    pruned,
    parametrized,
    spectral,
]


@pytest.mark.parametrize('make', DO_MORE)
def test_norms_that_do_more_stay_and_are_named(make):
    norm = make(8)
    block = nn.ModuleDict(
        dict(
            stem=nn.Sequential(nn.Conv2d(3, 8, 1), norm),
            other=make(8),
            more=nn.BatchNorm2d(8),
        )
    )
    before = block.state_dict()
    with pytest.warns(UserWarning) as said:
        replace_norms(block)
    assert block.stem[1] is norm
    assert isinstance(block.more, BCN)
    (text,) = {str(w.message) for w in said}
    kind = type(norm).__name__
    assert f'2 x {kind} as before (first: stem.1)' in text
    for name, value in block.state_dict().items():
        if 'more' not in name:
            assert value.data_ptr() == before[name].data_ptr()
    with pytest.warns(UserWarning, match='first: the module'):
        assert replace_norms(norm) is norm


def test_norms_within_a_norm_that_stays():
    norm = NormAct(8)
    norm.act = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8))
    with pytest.warns(UserWarning):
        replace_norms(norm)
    assert isinstance(norm.act[1], BCN)


def test_classes_that_do_more():
    for kind in (NormAct, GroupNormTwice, SyncNormAct):
        assert not is_replaceable(kind)


@pytest.mark.parametrize(
    'kind', [OtherDefaults, _BatchNormXd, SyncBatchNorm, nn.SyncBatchNorm]
)
def test_subclasses_that_only_normalize(kind):
    assert is_replaceable(kind)
    norm = batch_norm(kind, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer = replace_norms(nn.Sequential(norm))[0]
    assert isinstance(layer, BCN) and layer.eps == norm.eps
    assert torch.equal(layer.batch_weight, norm.weight)


def test_mmcvs_synchronized_norm(tmp_path):
    """It is none of torch's BatchNorms."""
    assert is_replaceable(MMSyncBN)
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        norm = batch_norm(MMSyncBN, 8, eps=1e-3)
    finally:
        dist.destroy_process_group()
    layer = replace_norms(norm)
    assert isinstance(layer, BCN) and layer.eps == 1e-3
    assert torch.equal(layer.running_var, norm.running_var)
