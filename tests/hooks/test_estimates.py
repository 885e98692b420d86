"""When ranks' estimates are averaged; ``test_sync`` tests how."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook

from bcn_mm import BCN, SyncEstimatesHook
from bcn_mm.hooks import estimates


def runner(model, iteration=0):
    saving = CheckpointHook(interval=2, by_epoch=False, save_last=False)
    return SimpleNamespace(
        model=model,
        train_dataloader=range(3),
        hooks=[saving],
        iter=iteration,
        max_iters=9,
    )


@pytest.mark.parametrize(
    'event, averages',
    [
        (lambda hook, r: hook.before_train(r), 0),
        (lambda hook, r: hook.before_val_epoch(r), 1),
        (lambda hook, r: hook.after_train_epoch(r), 1),
        *(
            (lambda hook, _, i=i: hook.after_train_iter(runner('n', i), 0), n)
            for i, n in enumerate((0, 1, 0, 1))
        ),
    ],
)  # fmt: skip
def test_when_estimates_are_averaged(event, averages, monkeypatch):
    averaged = []
    monkeypatch.setattr(estimates, 'average_estimates', averaged.append)
    event(SyncEstimatesHook(), runner('n'))
    assert averaged == averages * ['n']


@pytest.mark.parametrize('ranks, few', [([4, 3], 1), ([2, 3, 3], 0)])
def test_uneven_ranks_are_refused(ranks, few, monkeypatch):
    def gather(counts, own):
        assert own == 3
        counts[:] = ranks

    fake = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: len(ranks),
        all_gather_object=gather,
    )
    monkeypatch.setattr(estimates, 'dist', fake)
    with pytest.raises(ValueError, match=f'wait for rank {few} forever'):
        SyncEstimatesHook().before_train(runner('n'))
    ranks[:] = [3, 3]
    SyncEstimatesHook().before_train(runner('n'))


def test_one_process_is_left_alone():
    layer = BCN(4)
    layer(torch.randn(1, 4, 3, 3))
    before = layer.running_mean.clone()
    SyncEstimatesHook().before_train(runner(layer))
    SyncEstimatesHook().before_val_epoch(runner(layer))
    assert torch.equal(layer.running_mean, before)
