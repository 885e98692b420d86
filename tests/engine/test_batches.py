"""Random batches are what a model's own data would be, and always the same."""

import pytest
import torch
from mmengine.registry import init_default_scope

import bcn_mm
from bcn_mm.engine.batches import random_batch

SHAPE = 64, 96


@pytest.fixture(
    params=['mask-rcnn_r18_bcn-ws_shapes', 'deeplabv3_r18-d8_bcn-ws_shapes']
)
def cfg(request):
    cfg = bcn_mm.get_config(request.param)
    init_default_scope(cfg.default_scope)
    return cfg


def truth(cfg, sample):
    """The labels of objects, or of pixels."""
    if cfg.default_scope == 'mmdet':
        return sample.gt_instances.labels
    return sample.gt_sem_seg.data


def test_pictures_and_labels(cfg):
    batch = random_batch(cfg, 3, SHAPE, objects=50)
    assert [x.shape for x in batch['inputs']] == [(3, *SHAPE)] * 3
    labels = [truth(cfg, sample) for sample in batch['data_samples']]
    detects = cfg.default_scope == 'mmdet'
    assert {t.numel() for t in labels} == {50 if detects else 64 * 96}
    classes = 3 if detects else 4  # a segmenter's have the background
    found = set(torch.cat(labels).flatten().tolist())
    assert len(found) > 1 and found <= set(range(classes))


def test_equal_at_every_call(cfg):
    one, two = (random_batch(cfg, 2, SHAPE) for _ in range(2))
    assert all(map(torch.equal, one['inputs'], two['inputs']))
    for pair in zip(one['data_samples'], two['data_samples']):
        assert torch.equal(*(truth(cfg, sample) for sample in pair))


def test_other_scopes_are_refused(cfg):
    cfg.default_scope = 'mmpretrain'
    with pytest.raises(ValueError, match='the scope mmpretrain'):
        random_batch(cfg, 1, SHAPE)
