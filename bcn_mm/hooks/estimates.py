"""Estimates that agree on all ranks."""

import torch.distributed as dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..layers import average_estimates


@HOOKS.register_module()
class SyncEstimatesHook(Hook):
    """Makes the ranks' estimates agree before they are used or saved.

    In distributed training every rank moves the estimates of its
    :class:`~bcn_mm.layers.BCN` layers by its own images. Before each
    validation, at the end of each epoch, and in the iterations in which a
    ``CheckpointHook`` saves, this averages them with
    :func:`~bcn_mm.layers.average_estimates`. In a config:
    ``custom_hooks = [dict(type='SyncEstimatesHook')]``. Without effect in a
    single process, and where layers synchronise in every pass (``SyncBCN``).

    Ranks wait for each other, here, in ``SyncBCN`` and in DDP itself, so they
    need equally many batches. Where their numbers differ, training does not
    begin.

    Raises:
        ValueError: before training, if ranks have different numbers of
            batches.
    """

    # before hooks that use or save the model
    priority = 'HIGH'

    def before_train(self, runner: Runner) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            return
        try:
            batches = len(runner.train_dataloader)
        except TypeError:  # an iterable data set without a length
            return
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, batches)
        if len(set(counts)) > 1:
            few = counts.index(min(counts))
            raise ValueError(
                f'ranks have different numbers of batches ({counts}), and '
                f'would wait for rank {few} forever when it is done; use a '
                f"sampler that gives all ranks equally many (mmengine's "
                f'DefaultSampler with round_up=True)'
            )

    def before_val_epoch(self, runner: Runner) -> None:
        average_estimates(runner.model)

    def after_train_epoch(self, runner: Runner) -> None:
        average_estimates(runner.model)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        # saving itself is done, and announced, by the first rank alone
        if any(
            self.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and self.is_last_train_iter(runner))
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook) and not hook.by_epoch
        ):
            average_estimates(runner.model)
