"""The hook that has a training compute activations again."""

from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..layers.recompute import RecomputedActivations, recompute_activations


@HOOKS.register_module()
class RecomputeActivationsHook(Hook):
    """Trains in less memory, to the same bits.

    In a config, or by ``tools/train.py --save-memory``::

        custom_hooks = [dict(type='RecomputeActivationsHook')]

    While the model trains, autograd keeps no outputs of BCN, nor of the
    activations behind it, nor standardized weights: the backward pass computes
    them again, each in one elementwise pass, from what the layers keep anyway.
    Losses, gradients and buffers stay as they are. See
    :func:`bcn_mm.layers.recompute_activations` for what it covers, and
    ``docs/guides/memory_and_speed.md`` for what it saves.

    It goes with AMP, gradient accumulation, distributed training, and activation
    checkpointing of parts of the model (``with_cp=True``), which keep nothing
    already. A line in the log says after the first step what it spares. Models
    that ``torch.compile`` has compiled are left alone, with a warning.
    """

    def __init__(self) -> None:
        self._handle: Optional[RecomputedActivations] = None
        self._measures = False

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        self._handle = recompute_activations(
            model.module if is_model_wrapper(model) else model
        )
        self._measures = self._handle.is_active
        self._handle.measure(self._measures)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        if not self._measures or self._handle is None:
            return
        self._measures = False
        spared, kept = (n / 2**20 for n in self._handle.measure(False))
        runner.logger.info(
            f'RecomputeActivationsHook: {spared:,.0f} MiB of {spared + kept:,.0f} '
            f'that a step saved for its backward pass are not kept'
        )

    def after_train(self, runner: Runner) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
