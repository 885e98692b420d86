"""How far the channels that feed ReLUs are from being eliminated."""

import os
import os.path as osp
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple
from weakref import ref

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ...layers import BCN
from ...ops import affine

# What every logged scalar's name begins with.
PREFIX = 'singularity/'
# Margins are cut off here: a channel without variance has an infinite one.
_LIMIT = 100.0
_RELUS = {
    F.relu,
    F.relu_,
    F.relu6,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
}
_HARDTANHS = {F.hardtanh, F.hardtanh_}  # what nn.ReLU6 calls

# At the end of a layer's name.
_ABBREVIATION = re.compile(r'\b[bg]n(?=\d*/)')

# A run's scalars: pairs of a step and what was logged then.
History = List[Tuple[int, Dict[str, float]]]


class _Call(NamedTuple):
    """What one forward pass of a norm leaves behind, still on its device."""

    count: int  # positions: samples times spatial size
    level: int  # of a BCN that pyramid levels share
    # (3, C): mean, biased variance and number of positives of the output;
    # (5, C) for a BCN: mean and biased variance of the input as well
    rows: Tensor


def _moments(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, (C)."""
    mean, var, _ = affine.moments(affine.dense(x))
    # every sample has as many positions
    return mean.mean(0), var.mean(0) + mean.var(0, correction=0)


def _positives(x: Tensor) -> Tensor:
    """How many values of every channel are positive, (C)."""
    dtype = affine.compute_dtype(x)
    if affine.has_shortcuts(x):
        # sums of floats take a tenth of the time of sums of bools on the CPU
        positive = torch.gt(x, 0, out=torch.empty_like(x, dtype=dtype))
    else:
        positive = x > 0
    positive = positive.flatten(2) if x.dim() > 2 else positive.unsqueeze(2)
    return positive.sum(2, dtype=dtype).sum(0)


class _Tracer(TorchFunctionMode):
    """Finds out which norms' outputs go into a ReLU.

    By the identity of tensors, as long as nothing writes into them: ``out +=
    identity`` leaves a residual block's last norm's output the same object,
    but no longer that norm's output.
    """

    def __init__(self, feeds: Dict[str, None]) -> None:
        super().__init__()
        self.feeds = feeds
        self.outputs = {}

    def see(self, name: str, output: Tensor) -> None:
        if not output.is_inference():  # these count no versions
            self.outputs[id(output)] = ref(output), output._version, name

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _RELUS or (
            func in _HARDTANHS and (*args, *kwargs.values())[1] == 0
        ):
            x = args[0] if args else kwargs['input']
            output, version, name = self.outputs.get(
                id(x), (lambda: None, 0, '')
            )
            if output() is x and x._version == version:
                self.feeds[name] = None
        return func(*args, **kwargs)


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
        self._unseen = set()  # norms that have not run in this window
        self._calls: Dict[str, List[_Call]] = {}
        self._steps = 0  # of the current window
        self._tracer: Optional[_Tracer] = None
        self._gates, self._handles = [], []

    def before_train(self, runner: Runner) -> None:
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        self._norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (_BatchNorm, nn.GroupNorm))
        }
        if any(map(_is_compiled, runner.model.modules())):
            self._norms = {}
            runner.logger.warning(
                'EliminationSingularityHook: torch.compile hides the layers '
                'of this model; nothing is measured'
            )
        self.results, self.history = None, []
        self._begin_window()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        left = self.interval - runner.iter % self.interval
        if left > self.window or not self._norms:
            return
        # the norms' own hooks exist only while the model runs forward: what
        # checkpointing repeats in the backward pass, and a validation within
        # the window, are not seen
        self._close()  # a step that raised an error left it open
        self._gates = [
            runner.model.register_forward_pre_hook(self._enter),
            runner.model.register_forward_hook(self._leave, always_call=True),
        ]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        if not self._gates:
            return
        self._close()
        self._unseen -= self._calls.keys()
        self._steps += 1
        if (runner.iter + 1) % self.interval == 0:
            self._end_window(runner)
            self._begin_window()

    def after_train(self, runner: Runner) -> None:
        self._close()
        if self.history and is_main_process():
            path = osp.join(runner.log_dir, 'vis_data', 'singularity.png')
            draw_history({'': self.history}, path)
            runner.logger.info(f'Elimination singularities: see {path}')

    def _close(self) -> None:
        for handle in self._gates:
            handle.remove()
        self._gates = []

    def _enter(self, model: nn.Module, inputs: Any) -> None:
        if self._handles:
            return  # a model that calls itself
        if self._unseen:
            self._tracer = _Tracer(self._feeds)
            self._tracer.__enter__()
        for name, norm in self._norms.items():
            if name in self._feeds or name in self._unseen:

                def measure(module, args, kwargs, output, name=name):
                    self._measure(name, module, args, kwargs, output)

                self._handles.append(
                    norm.register_forward_hook(measure, with_kwargs=True)
                )

    def _leave(self, model: nn.Module, inputs: Any, output: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._tracer is not None:
            self._tracer.__exit__(None, None, None)
            self._tracer = None

    @torch.no_grad()
    def _measure(self, name, norm, args, kwargs, output) -> None:
        if self._tracer is not None:
            self._tracer.see(name, output)
        calls = self._calls.setdefault(name, [])
        if output.numel() == 0:
            return
        rows, level = [*_moments(output), _positives(output)], 0
        if isinstance(norm, BCN):
            x = (*args, *kwargs.values())[0]
            rows, level = [*rows, *_moments(x)], norm.level
        count = output.numel() // output.shape[1]
        calls.append(_Call(count, level, torch.stack(rows)))

    def _begin_window(self) -> None:
        self._calls, self._steps = {}, 0
        self._feeds, self._unseen = {}, set(self._norms)

    def _end_window(self, runner: Runner) -> None:
        sums = _over_ranks(
            [
                _sum_up(norm, self._calls[name] if name in self._feeds else ())
                for name, norm in self._norms.items()
            ]
        )
        sums = dict(zip(self._norms, sums))
        # first those that ran on this rank, in their order
        fed = [n for n in {**self._feeds, **sums} if sums[n][0].item() > 0]
        layers = {
            name: self._layer(*sums[name][1:])
            for name in fed
            if sums[name][1].any()
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
        network = self._scalars(list(layers.values()))
        self.results = dict(step=step, network=network, layers=layers)
        if not is_main_process():
            return
        tags = {PREFIX + key: value for key, value in network.items()}
        for name, layer in layers.items():
            for key, value in layer['scalars'].items():
                tags[f'{PREFIX}{name}/{key}'] = value
        self.history.append((step, tags))
        runner.visualizer.add_scalars(tags, step=step)
        runner.logger.info(self._line(step))

    def _layer(self, outputs: Tensor, inputs: Optional[Tensor] = None) -> dict:
        """The result of a layer, from the sums of all ranks."""
        count, positive, first, second = outputs
        mean, std = first / count, (second / count - (first / count) ** 2)
        std = std.clamp_min(0).sqrt()
        margin = torch.where(mean == 0, mean, mean / std)
        margin = margin.clamp(-_LIMIT, _LIMIT)
        rate = positive / count
        dead = rate < self.dead_below
        near = dead | (margin < self.near_below)
        layer = dict(
            rate=rate,
            margin=margin,
            dead_channels=dead.nonzero().flatten().tolist(),
            near_channels=near.nonzero().flatten().tolist(),
        )
        if inputs is not None:
            calls, *sums = inputs
            mean, second, estimate, estimate_second = (s / calls for s in sums)
            var = (second - mean**2).clamp_min(0)
            layer['lag'] = (estimate - mean).abs() / var.sqrt()
            layer['var_ratio'] = (estimate_second - estimate**2) / var
        layer['scalars'] = self._scalars([layer])
        return layer

    def _scalars(self, layers: Sequence[dict]) -> Dict[str, float]:
        """The scalars of some layers together."""
        margin = _finite(layers, 'margin')
        scalars = dict(
            dead=sum(len(layer['dead_channels']) for layer in layers)
            / len(margin),
            near=sum(len(layer['near_channels']) for layer in layers)
            / len(margin),
            margin_min=margin.min().item(),
            margin_median=margin.median().item(),
        )
        lag, ratio = _finite(layers, 'lag'), _finite(layers, 'var_ratio')
        if len(lag) and len(ratio):
            scalars.update(
                lag=lag.median().item(),
                lag_max=lag.max().item(),
                var_ratio=ratio.median().item(),
            )
        return scalars

    def _line(self, step: int) -> str:
        layers = self.results['layers'].values()
        network = self.results['network']
        line = (
            f'Elimination singularities, steps {step - self._steps + 1} to '
            f'{step}: of {len(_finite(layers, "margin"))} channels '
            f'{sum(len(layer["dead_channels"]) for layer in layers)} dead, '
            f'{sum(len(layer["near_channels"]) for layer in layers)} near; '
            f'margin: lowest {network["margin_min"]:.2f}, '
            f'median {network["margin_median"]:.2f}'
        )
        if 'lag' in network:
            line += (
                f'; estimates: lag {network["lag"]:.2f}, '
                f'variance ratio {network["var_ratio"]:.2f}'
            )
        return line


def _is_compiled(module: nn.Module) -> bool:
    if getattr(module, '_compiled_call_impl', None) is not None:
        return True
    # torch.compile(module) wraps forward, mmengine's compile=True train_step
    return any(
        hasattr(getattr(module, name, None), '_torchdynamo_orig_callable')
        for name in ('forward', 'train_step')
    )


def _finite(layers: Sequence[dict], key: str) -> Tensor:
    """All finite values of some layers, flat."""
    values = [layer[key].flatten() for layer in layers if key in layer]
    values = torch.cat(values) if values else torch.empty(0)
    return values[values.isfinite()]


def _weighted(weight: Tensor, mean: Tensor, var: Tensor) -> List[Tensor]:
    """What makes moments additive; nothing of channels that are not finite."""
    ok = mean.isfinite() & var.isfinite()
    weight = weight * ok
    mean, var = (torch.where(ok, t, 0) for t in (mean, var))
    return [weight, weight * mean, weight * (var + mean**2)]


def _sum_up(norm: nn.Module, calls: Sequence[_Call]) -> List[Tensor]:
    """This rank's sums over the calls of a norm that count, in float64.

    Returns:
        list[Tensor]: the number of calls, a scalar; (4, C): weight,
        positives, and the first and second moment of the output, times
        weight; for a BCN (5, num_levels, C): weight, and these moments of
        the input and of the estimate, times weight.
    """
    channels = getattr(norm, 'num_features', None) or norm.num_channels
    outputs = torch.zeros(4, channels, dtype=torch.float64)
    inputs = None
    if isinstance(norm, BCN):
        inputs = outputs.new_zeros(5, norm.num_levels, channels)
        estimates = [
            t.detach().double().cpu().view(norm.num_levels, -1)
            for t in (norm.running_mean, norm.running_var)
        ]
    if calls:
        # here alone the device is waited for
        rows = torch.stack([call.rows for call in calls]).double().cpu()
    for call, (mean, var, positive, *own) in zip(calls, rows if calls else ()):
        weight, first, second = _weighted(
            torch.full_like(mean, call.count), mean, var
        )
        positive = torch.where(weight > 0, positive, 0)
        outputs += torch.stack((weight, positive, first, second))
        if own:
            weight, first, second = _weighted(torch.ones_like(mean), *own)
            mu, sigma2 = (t[call.level] for t in estimates)
            inputs[:, call.level] += torch.stack(
                (
                    *(weight, first, second),
                    *(weight * mu, weight * (sigma2 + mu**2)),
                )
            )
    number = outputs.new_tensor(float(len(calls)))
    return [number, outputs] + ([] if inputs is None else [inputs])


def _over_ranks(sums: List[List[Tensor]]) -> List[List[Tensor]]:
    """Add up the sums of all ranks, in one message."""
    flat = torch.cat([t.flatten() for layer in sums for t in layer])
    all_reduce(flat)
    parts = iter(flat.split([t.numel() for layer in sums for t in layer]))
    return [[next(parts).view(t.shape) for t in layer] for layer in sums]


def draw_history(runs: Dict[str, History], path: str) -> None:
    """Draw a heat map of layers by steps: lowest margins and dead channels.

    Args:
        runs (dict): What each run logged, by a name that goes above its
            panels. One run has its two panels side by side, several have one
            column each, with layers that differ in mmcv's abbreviation of the
            norm only (``gn1``, ``bn1``) in one row, as ``norm1``.
        path (str): The PNG, written beside its target and moved there.
    """
    # here, since few who import bcn_mm draw, and not pyplot, which has a state
    # and a back end of the user's
    from matplotlib.figure import Figure

    if len(runs) > 1:
        runs = {
            name: [
                (step, {_ABBREVIATION.sub('norm', k): v for k, v in t.items()})
                for step, t in history
            ]
            for name, history in runs.items()
        }
    layers = {}
    for history in runs.values():
        for _, tags in history:
            layers.update(dict.fromkeys(_layers_of(tags)))
    layers = list(layers)
    steps = {name: [step for step, _ in h] for name, h in runs.items()}
    lowest = {k: _grid(h, layers, 'margin_min') for k, h in runs.items()}
    dead = {k: 100 * _grid(h, layers, 'dead') for k, h in runs.items()}
    panels = (
        (
            lowest,
            'lowest margin of a channel',
            'mean / std of its pre-activation',
            dict(cmap='inferno', vmin=-5, vmax=0),
            'both',
        ),
        (
            dead,
            'dead channels',
            "% of the layer's",
            dict(cmap='inferno_r', vmin=0, vmax=_ceiling(dead.values())),
            'neither',
        ),
    )
    one = len(runs) == 1
    height = 1.3 + 0.15 * max(len(layers), 6)
    figure = Figure(
        figsize=(max(9, 3 + 2 * len(runs)), height if one else 2 * height),
        layout='constrained',
    )
    axes = figure.subplots(
        *((1, 2) if one else (2, len(runs))),
        sharey=True,
        squeeze=False,
    )
    axes = axes.reshape(2, len(runs))
    for row, (values, title, unit, colours, extend) in zip(axes, panels):
        for axis, (name, grid) in zip(row, values.items()):
            axis.set_facecolor('lightgrey')
            mesh = axis.pcolormesh(
                _edges(steps[name]),
                range(len(layers) + 1),
                grid,
                rasterized=True,
                **colours,
            )
            axis.set_title(title if one else name, fontsize='medium')
            axis.set_xlabel('training step')
        bar = figure.colorbar(
            mesh, ax=list(row), extend=extend, fraction=0.05, pad=0.02
        )
        bar.set_label(unit if one else f'{title}\n({unit})')
        row[0].set_yticks(
            [i + 0.5 for i in range(len(layers))], layers, fontsize=7
        )
    axes[0, 0].set_ylim(len(layers), 0)  # the first layer on top
    if any(np.isnan(grid).any() for grid in dead.values()):
        figure.supxlabel('grey: not measured', fontsize='small', color='grey')
    os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
    draft = f'{osp.splitext(path)[0]}.part.png'
    figure.savefig(draft, dpi=100)
    os.replace(draft, path)


def _layers_of(tags: Dict[str, float]) -> List[str]:
    """The layers' names among the names of scalars, in their order."""
    ending = '/dead'
    return [
        tag[len(PREFIX) : -len(ending)]
        for tag in tags
        if tag.endswith(ending) and tag != PREFIX + ending[1:]
    ]


def _grid(history: History, layers: Sequence[str], key: str) -> np.ndarray:
    """(layers, steps), NaN where a layer was not measured."""
    return np.array(
        [
            [tags.get(f'{PREFIX}{name}/{key}', np.nan) for _, tags in history]
            for name in layers
        ]
    )


def _edges(steps: Sequence[int]) -> List[float]:
    """Where cells that end at ``steps`` begin and end."""
    width = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    return [steps[0] - width, *steps]


def _ceiling(grids) -> float:
    """The largest percentage, 1 at least."""
    return max(1, *(np.nanmax(grid) for grid in grids))
