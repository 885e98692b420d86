"""The hook that watches elimination singularities."""

import os.path as osp
from typing import Any, Dict, List, Optional, Set, Tuple

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ...layers.recompute import is_compiled
from ...ops._compat import ALWAYS_CALL
from .measure import Measurement, ReLUTracer, measure
from .plot import draw_history
from .statistics import (
    History,
    layer_result,
    log_line,
    over_ranks,
    scalars_of,
    sum_up,
    tags_of,
)


@HOOKS.register_module()
class EliminationSingularityHook(Hook):
    r"""Watches how close channels are to elimination singularities.

    A channel whose pre-activation, the input of a ReLU, is negative at every
    position of every sample is eliminated: it puts out 0, receives no
    gradient, and the network trains on without it. Near such a point of
    parameter space training is slow. BatchNorm keeps channels away from
    there, since it normalizes each for itself; GroupNorm and LayerNorm do
    not; BCN does so at any batch size (arXiv:1911.09738, the sections on
    elimination singularities). In a config::

        custom_hooks = [dict(type='EliminationSingularityHook')]

    For every norm (BatchNorm, SyncBatchNorm, GroupNorm, BCN) whose output is
    the input of a ReLU or ReLU6, as module or as function, in-place or not,
    this measures, over the last ``window`` steps before each multiple of
    ``interval``, for each channel:

    - the *activation rate*: the fraction of positions (samples times spatial
      positions, of all steps and calls) with a positive pre-activation;
    - the *margin*: the pre-activation's mean / standard deviation (biased)
      over the same positions. A Gaussian one with a margin of -1, -2, -3 is
      positive at 16%, 2.3%, 0.13% of them. Cut off at :math:`\pm 100`;

    and of these, for each layer and for all layers together (the network):

    - ``dead``: the fraction of channels with an activation rate below
      ``dead_below``;
    - ``near``: the fraction of channels that are dead or have a margin below
      ``near_below``;
    - ``margin_min``, ``margin_median``: the lowest margin, and the median.

    For BCN it also measures how far the estimates :math:`\hat\mu,
    \hat\sigma^2`, as they are at the end of the window, are from the mean
    :math:`\mu` and variance :math:`\sigma^2` of the layer's input in it, in
    which every call weighs the same, as in the estimates:

    - ``lag``, ``lag_max``: the median and the largest of
      :math:`|\hat\mu - \mu| / \sigma`;
    - ``var_ratio``: the median of :math:`\hat\sigma^2 / \sigma^2`.

    With ``num_levels`` above 1, a channel has an estimate per level, each is
    compared with the inputs of its own level, and medians are over channels
    and levels. The activation rate and the margin are those of the channel,
    over all levels: what survives on one level is not eliminated.

    These are scalars, ``singularity/LAYER/dead`` and so on with the layer's
    name in the model, ``singularity/dead`` and so on for the network, which
    all of the visualizer's backends get once per window; one line in the log
    says the network's. A heat map of layers by steps is drawn at the end of
    training, to ``vis_data/singularity.png`` beside the log;
    ``tools/analysis_tools/plot_singularity.py`` draws it from
    ``vis_data/scalars.json`` at any time, for several runs side by side.

    **What counts.** Which norm feeds a ReLU is seen anew in every window, in
    the first of its steps in which the norm runs, and holds for the rest of
    it: one that feeds a ReLU in later steps only does not count until another
    window begins with such a step. The last norm of a residual block does not
    count: its output is added to something, and the ReLU sees the sum. Nor do
    norms of which something other than an identity is between them and the
    ReLU. Norms in evaluation mode count as any other. Only the model's own
    forward pass counts: not validation, and not what activation checkpointing
    repeats. Calls with empty inputs are passed over, and so are, for each
    channel, calls in which its moments are not finite.

    In distributed training the numbers are those of all ranks' positions,
    and of the ranks' estimates averaged as by
    :func:`~bcn_mm.layers.average_estimates`; that takes one ``all_reduce``
    of 4 (GroupNorm, BatchNorm) or 9 (BCN, 4 + 5 ``num_levels``) float64
    numbers per channel and window. Where no number of a window is finite, or
    no norm has fed a ReLU in it, a warning says which.

    The training state is only read. Between windows nothing is registered in
    the model. Within one, the device is not waited for before its last step
    is over. Seeing where outputs go costs one or two microseconds of host
    time for each call of a function of torch; it is done in a window's first
    step, and goes on only while some norm has not run. A model that
    ``torch.compile`` has compiled does not run its layers one by one: this
    hook then warns and measures nothing.

    Args:
        interval (int): Steps from one window's end to the next. Default: 50.
        window (int): Steps in a window. Default: 5.
        dead_below (float): The activation rate, in (0, 1], below which a
            channel is dead. Default: 0.001.
        near_below (float): The margin, at most 0, below which a channel is
            near elimination. Default: -2.

    Attributes:
        results (dict, optional): Of the last window, on every rank: ``step``
            (int), at which it ended; ``network``, the dict of the network's
            scalars; ``layers``, for every layer, in the order in which they
            ran, a dict of its ``scalars``, its ``dead_channels`` and
            ``near_channels`` (sorted lists of int), and float64 tensors
            ``rate`` and ``margin``, (C), and for a BCN ``lag`` and
            ``var_ratio``, (num_levels, C), NaN where nothing was measured.
            None before the first window's end.

    Raises:
        ValueError: if an argument is out of its range.
    """

    # what other hooks do with the model after a step is not measured
    priority = 'VERY_HIGH'

    def __init__(
        self,
        interval: int = 50,
        window: int = 5,
        dead_below: float = 0.001,
        near_below: float = -2.0,
    ) -> None:
        if not 1 <= window <= interval:
            raise ValueError(
                f'window must be at least 1 and at most interval, but got '
                f'window={window} and interval={interval}'
            )
        if not 0 < dead_below <= 1:
            raise ValueError(f'dead_below must be in (0, 1], got {dead_below}')
        if not near_below <= 0:
            raise ValueError(f'near_below must be at most 0, got {near_below}')
        self.interval = interval
        self.window = window
        self.dead_below = dead_below
        self.near_below = near_below
        self.results: Optional[dict] = None
        self.history: History = []
        self._norms: Dict[str, nn.Module] = {}
        self._feeds: Dict[str, None] = {}  # in the order in which they ran
        self._unseen: Set[str] = set()  # norms that have not run in this window
        self._calls: Dict[str, List[Measurement]] = {}
        self._steps = 0  # of the current window
        self._tracer: Optional[ReLUTracer] = None
        self._model_hooks: List[RemovableHandle] = []
        self._norm_hooks: List[RemovableHandle] = []

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        self._norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (_BatchNorm, nn.GroupNorm))
        }
        if any(map(is_compiled, runner.model.modules())):
            self._norms = {}
            runner.logger.warning(
                'EliminationSingularityHook: torch.compile hides the layers '
                'of this model; nothing is measured'
            )
        self.results, self.history = None, []
        self._begin_window()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        left = self.interval - runner.iter % self.interval
        if left > self.window or not self._norms:
            return
        # the norms' own hooks exist only while the model runs forward: what
        # checkpointing repeats in the backward pass, and a validation within
        # the window, are not seen
        self._remove_model_hooks()  # a step that raised an error left it open
        self._model_hooks = [
            runner.model.register_forward_pre_hook(self._begin_forward),
            runner.model.register_forward_hook(self._end_forward, **ALWAYS_CALL),
        ]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        if not self._model_hooks:
            return
        self._remove_model_hooks()
        self._unseen -= self._calls.keys()
        self._steps += 1
        if (runner.iter + 1) % self.interval == 0:
            self._end_window(runner)
            self._begin_window()

    def after_train(self, runner: Runner) -> None:
        self._remove_model_hooks()
        if self.history and is_main_process():
            path = osp.join(runner.log_dir, 'vis_data', 'singularity.png')
            draw_history({'': self.history}, path)
            runner.logger.info(f'Elimination singularities: see {path}')

    def _remove_model_hooks(self) -> None:
        for handle in self._model_hooks:
            handle.remove()
        self._model_hooks = []

    def _begin_forward(self, model: nn.Module, inputs: Any) -> None:
        if self._norm_hooks:
            return  # a model that calls itself
        if self._unseen:
            self._tracer = ReLUTracer(self._feeds)
            self._tracer.__enter__()
        for name, norm in self._norms.items():
            if name in self._feeds or name in self._unseen:

                def after(
                    module: nn.Module,
                    args: Tuple[Any, ...],
                    kwargs: Dict[str, Any],
                    output: Tensor,
                    name: str = name,
                ) -> None:
                    x = (*args, *kwargs.values())[0]
                    self._measure(name, module, x, output)

                self._norm_hooks.append(
                    norm.register_forward_hook(after, with_kwargs=True)
                )

    def _end_forward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        for handle in self._norm_hooks:
            handle.remove()
        self._norm_hooks = []
        if self._tracer is not None:
            self._tracer.__exit__(None, None, None)
            self._tracer = None

    def _measure(self, name: str, norm: nn.Module, x: Tensor, output: Tensor) -> None:
        if self._tracer is not None:
            self._tracer.follow(output, name)
        calls = self._calls.setdefault(name, [])
        measurement = measure(norm, x, output)
        if measurement is not None:
            calls.append(measurement)

    def _begin_window(self) -> None:
        self._calls, self._steps = {}, 0
        self._feeds, self._unseen = {}, set(self._norms)

    def _end_window(self, runner: Runner) -> None:
        sums = over_ranks(
            [
                sum_up(norm, self._calls[name] if name in self._feeds else ())
                for name, norm in self._norms.items()
            ]
        )
        sums = dict(zip(self._norms, sums))
        # first those that ran on this rank, in their order
        fed = [name for name in {**self._feeds, **sums} if sums[name].calls.item() > 0]
        layers = {
            name: layer_result(sums[name], self.dead_below, self.near_below)
            for name in fed
            if sums[name].outputs.any()
        }
        if not layers:
            why = (
                f'norms have fed ReLUs in this window ({len(fed)}), but the '
                f'moments of no channel were finite; nothing is measured'
                if fed
                else 'no norm has fed a ReLU in this window'
            )
            runner.logger.warning(f'EliminationSingularityHook: {why}')
            return
        step = runner.iter + 1
        network = scalars_of(list(layers.values()))
        self.results = dict(step=step, network=network, layers=layers)
        if not is_main_process():
            return
        tags = tags_of(self.results)
        self.history.append((step, tags))
        runner.visualizer.add_scalars(tags, step=step)
        runner.logger.info(log_line(self.results, self._steps))
