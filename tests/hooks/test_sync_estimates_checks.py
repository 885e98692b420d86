"""What SyncEstimatesHook refuses, what it warns of, and one process."""

import itertools
import uuid

import pytest
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from support.ranks import on_ranks
from support.sync_estimates import (
    Net,
    Score,
    assert_equal,
    batches,
    loader,
    make_runner,
)
from torch import nn
from torch.utils.data import IterableDataset

from bcn_mm import BCN, SyncBCN, SyncEstimatesHook

WRAPPED = [
    (BCN, True, 1),
    (BCN, False, 0),
    (SyncBCN, True, 0),
    (lambda c, momentum: nn.GroupNorm(2, c), True, 0),
]


def run_wrapped(rank, world, folder):
    for i, (make, broadcast, _) in enumerate(WRAPPED):
        make_runner(
            Net(make, rank=1),  # SyncBCN needs all ranks in every pass
            rank,
            f'{folder}/{i}',
            dict(by_epoch=True, max_epochs=2),
            loader(batches(rank, 2)),
            dict(type='SyncEstimatesHook'),
            broadcast_buffers=broadcast,
        ).train()


def test_broadcast_buffers_are_named_once(tmp_path):
    """DDP would overwrite all estimates but the first rank's."""
    on_ranks(2, run_wrapped, str(tmp_path))
    for i, (_, _, count) in enumerate(WRAPPED):
        logs = [p.read_text() for p in (tmp_path / f'{i}').rglob('*.log')]
        text = ''.join(logs)
        assert 'Epoch(train)' in text
        assert text.count('model_wrapper_cfg.broadcast_buffers=False') == count


class Endless(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return itertools.cycle(self.data)


# by rank: the number of batches, and who has the fewest, if anybody
LENGTHS = {
    2: [([4, 3], 1), ([3, 3], None), (None, None)],
    3: [([2, 3, 3], 0), ([2, 2, 2], None)],
}


def run_uneven(rank, world, folder):
    messages = []
    for lengths, _ in LENGTHS[world]:
        data = batches(rank, lengths[rank]) if lengths else Endless([0])
        cfg = dict(by_epoch=False, max_iters=2)  # the loop that takes either
        runner = make_runner(Net(rank=rank), rank, folder, cfg, loader(data))
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        try:
            SyncEstimatesHook().before_train(runner)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize('world', LENGTHS)
def test_uneven_ranks_are_refused(world, tmp_path):
    for messages in on_ranks(world, run_uneven, str(tmp_path)):
        for (lengths, few), message in zip(LENGTHS[world], messages):
            assert (message is None) == (few is None)
            if message:
                assert f'wait for rank {few} forever' in message
                assert f'({lengths})' in message


def test_one_process_is_left_alone(tmp_path):
    """With and without the hook, to the bit, beside a copy of its own."""
    states = []
    for hooks in ([], [dict(type='SyncEstimatesHook')]):
        ema = EMAHook(update_buffers=True, momentum=0.4)
        model = Net()
        Runner(
            model,
            work_dir=str(tmp_path),
            train_dataloader=loader(batches(0, 3)),
            val_dataloader=loader(batches(0, 1)),
            val_evaluator=Evaluator(Score()),
            val_cfg={},
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            custom_hooks=[ema, *hooks],
            experiment_name=uuid.uuid4().hex,
        ).train()
        states.append({**model.state_dict(), **ema.ema_model.state_dict()})
    assert_equal(*states)
