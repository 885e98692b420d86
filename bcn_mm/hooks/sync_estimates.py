"""Estimates that agree on all ranks."""

from typing import Any, List

import torch.distributed as dist
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers import BCN, average_estimates


@HOOKS.register_module()
class SyncEstimatesHook(Hook):
    """Makes the ranks' estimates agree before they are used or saved.

    In distributed training every rank moves the estimates of its
    :class:`~bcn_mm.layers.BCN` layers by its own images. Before each
    validation, at the end of each epoch, and in the iterations in which a
    ``CheckpointHook`` saves, this averages them with
    :func:`~bcn_mm.layers.average_estimates`, those of the model and those of
    every ``EMAHook``'s copy of it. In a config:
    ``custom_hooks = [dict(type='SyncEstimatesHook')]``. Without effect in a
    single process, and where layers synchronise in every pass (``SyncBCN``).

    A copy weighs the ranks by the passes that the model has seen on them, and
    has the model's ``num_batches_tracked`` from then on: mmengine averages
    estimates but leaves integers at what they were when averaging began.

    Ranks wait for each other, here, in ``SyncBCN`` and in DDP itself, so they
    need equally many batches. Where their numbers differ, training does not
    begin. Where DDP was asked to broadcast the first rank's buffers in every
    pass, the other ranks' estimates are lost, and a warning says so.

    Raises:
        ValueError: before training, if ranks have different numbers of
            batches.
    """

    # after EMAHook, whatever moves its copy, and before CheckpointHook
    priority = 'LOW'

    def before_train(self, runner: Runner) -> None:
        if get_world_size() == 1:
            return
        if _broadcasts(runner.model):
            runner.logger.warning(
                'SyncEstimatesHook: DistributedDataParallel has '
                'broadcast_buffers=True: every pass begins with the estimates '
                'of the first rank, those of the others are lost; set '
                'model_wrapper_cfg.broadcast_buffers=False, or use SyncBCN'
            )
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

    # not before_val_epoch, in which EMAHook swaps the model with its copy
    def before_val(self, runner: Runner) -> None:
        _average(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        _average(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        # saving itself is done, and announced, by the first rank alone
        if any(
            self.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and self.is_last_train_iter(runner))
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook) and not hook.by_epoch
        ):
            _average(runner)


def _average(runner: Runner) -> None:
    """Average the estimates of a runner's model and of its EMA copies."""
    if get_world_size() == 1:
        return
    models = [runner.model]
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            models.append(hook.ema_model)
            for copy, source in zip(_layers(hook.ema_model), _layers(hook.src_model)):
                copy.num_batches_tracked.copy_(source.num_batches_tracked)
    average_estimates(nn.ModuleList(models))


def _layers(model: nn.Module) -> List[BCN]:
    return [m for m in model.modules() if isinstance(m, BCN)]


def _broadcasts(model: nn.Module) -> bool:
    """Whether DDP gives all ranks the first one's estimates in every pass."""
    return any(
        isinstance(module, DistributedDataParallel)
        and getattr(module, 'broadcast_buffers', False)
        and not all(layer.sync for layer in _layers(module))
        for module in model.modules()
    )
