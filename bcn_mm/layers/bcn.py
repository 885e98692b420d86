"""The Batch-Channel Normalization layer."""

import warnings
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    batch_channel_norm,
    check_num_groups,
    check_start,
    default_num_groups,
)
from ..weights.norm_layouts import (
    State,
    adopt_authors,
    adopt_batch_norm,
    adopt_group_norm,
    fill_num_batches_tracked,
    layout_of,
)
from ..weights.report import load_report
from . import frozen
from .levels import LevelCounter


class _Ranks:
    """A process group, which copies share and pickles do without."""

    def __init__(self, group: Optional['dist.ProcessGroup'] = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_Ranks':
        return self

    def __reduce__(self) -> Tuple[type, Tuple[()]]:
        return type(self), ()


@MODELS.register_module()
class BCN(nn.GroupNorm):
    r"""Batch-Channel Normalization, ``norm_cfg=dict(type='BCN')``.

    A batch stage, which normalizes every channel with running estimates
    (``estimate=True``, for micro-batches) or as BatchNorm does
    (``estimate=False``, for large batches), followed by a channel stage, which
    normalizes groups of channels within each sample. For the definition see
    :func:`bcn_mm.ops.batch_channel_norm`. Source: arXiv:1911.09738 and
    arXiv:1903.10520v2.

    It is an ``nn.GroupNorm`` to every tool that asks (weight decay,
    ``init_cfg`` by layer type, mmcv's ``is_norm``), whose ``weight`` and
    ``bias`` are those of the channel stage, one per group; it is no
    ``_BatchNorm``, so mmdet's ``norm_eval=True`` does not stop its estimates.
    Attributes that hold it are named as BatchNorm's (``bn1``), and the state
    of an ``nn.BatchNorm2d`` loads into the batch stage, with a channel stage
    that is the identity in the mean
    (:func:`bcn_mm.weights.norm_layouts.adopt_batch_norm`). The authors' layout
    loads too (``weight`` and ``bias`` of shape (1, G, 1) beside ``bn.*`` or
    ``pbn.*``), and that of an ``nn.GroupNorm`` as an approximation
    (:func:`bcn_mm.weights.norm_layouts.adopt_group_norm`).

    **Heads that are shared by pyramid levels** (RetinaNet, FCOS, ATSS, GFL,
    SOLO) pass every level through one layer, and the levels' statistics
    differ, so that no single estimate is right for any of them.
    ``num_levels`` keeps one estimate per level; the affine parameters stay
    shared. The level is known by order: such heads pass the levels from fine
    to coarse, so the calls of one pass are levels 0, 1, 2, ... A pass begins
    with the outermost module that is called, a detector or a head, and
    whatever came before it does not matter: a pass may break off, or have
    fewer levels. Within a pass another round of the levels begins after
    ``num_levels`` calls, and when an input has more spatial positions than
    the one before it. Calls of the layer from outside of any module are told
    apart by these two rules alone, unless
    :func:`bcn_mm.layers.levels.one_pass` says where a pass begins.

    Args:
        num_features (int): The number of channels C.
        num_groups (int, optional): The number of groups G of the channel
            stage, a divisor of C. Default: None, which takes 32 groups where
            that leaves at least two channels in each, else fewer (see
            :func:`bcn_mm.ops.default_num_groups`).
        eps (float): Added to both variances. Default: 1e-5.
        momentum (float, optional): The rate r in [0, 1] at which estimates
            move; None for the cumulative average. Default: 0.01, at which
            an estimate is a mean over some hundred passes: with one image
            in each, a larger rate makes it noisy.
        start (str): How estimates begin: ``'identity'``, at 0 and 1;
            ``'first'``, with the first pass; ``'average'``, as the average of
            all passes until 1 / n falls below ``momentum`` (see
            :func:`bcn_mm.ops.batch_channel_norm`). Default: ``'identity'``.
        affine (bool): Whether both stages have learnable affine parameters.
            Default: True.
        estimate (bool): Whether the batch stage uses running estimates in
            training too. Default: True.
        num_levels (int): How many pyramid levels share the layer and pass
            through it in turn, from fine to coarse. Default: 1.
        sync (bool): Whether distributed training takes the batch statistics
            over all ranks in every pass (see the ``group`` of
            :func:`bcn_mm.ops.batch_channel_norm`); else every rank has its
            own estimates and :class:`bcn_mm.hooks.SyncEstimatesHook` makes
            them agree. Without effect in a single process. Default: False.
        process_group (ProcessGroup, optional): The ranks that ``sync`` is
            about. Default: None, all of them.
        device (torch.device, optional): Of parameters and buffers.
        dtype (torch.dtype, optional): Likewise.

    Shape:
        - Input: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions, floating;
          N and the spatial size may be 0 or 1.
        - Output: the shape, dtype and memory layout of the input.

    Attributes:
        weight: (G), with ``bias`` the affine pair of the channel stage.
        bias: (G).
        batch_weight: (C), with ``batch_bias`` that of the batch stage.
        batch_bias: (C).
        running_mean: (C), or (num_levels, C) if that is more than one; the
            estimate of the mean; starts at 0.
        running_var: Likewise, of the variance; starts at 1.
        num_batches_tracked: training passes seen, an int64 scalar, or
            (num_levels).

    Raises:
        TypeError: if ``num_groups`` is no integer.
        ValueError: if ``num_groups`` does not divide ``num_features``, or
            ``momentum``, ``eps`` or ``num_levels`` is out of range.

    Example:
        >>> layer = BCN(64)
        >>> layer(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    _abbr_ = 'bn'

    def __init__(
        self,
        num_features: int,
        num_groups: Optional[int] = None,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.01,
        start: str = 'identity',
        affine: bool = True,
        estimate: bool = True,
        num_levels: int = 1,
        sync: bool = False,
        process_group: Optional['dist.ProcessGroup'] = None,
        device: Optional[Union[str, torch.device]] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f'num_features must be positive, but got {num_features}')
        if num_groups is None:
            num_groups = default_num_groups(num_features)
        check_num_groups(num_groups, num_features)
        if num_groups == num_features > 1:
            warnings.warn(
                f'num_groups={num_groups} puts every channel in a group of '
                f'its own: the channel stage then cancels the batch stage and '
                f'BCN is InstanceNorm; choose a smaller num_groups',
                stacklevel=2,
            )
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f'momentum must be in [0, 1] or None, but got {momentum}')
        check_start(start)
        if not eps > 0:
            raise ValueError(f'eps must be positive, but got {eps}')
        if num_levels < 1:
            raise ValueError(f'num_levels must be positive, got {num_levels}')
        super().__init__(num_groups, num_features, eps=eps, affine=False)
        self.momentum = momentum
        self.start = start
        self.estimate = estimate
        self.num_levels = num_levels
        self.sync = sync
        self._ranks = _Ranks(process_group)
        self.affine = affine
        factory = dict(device=device, dtype=dtype)
        for name, size in (
            ('weight', num_groups),
            ('bias', num_groups),
            ('batch_weight', num_features),
            ('batch_bias', num_features),
        ):
            self.register_parameter(
                name,
                nn.Parameter(torch.empty(size, **factory)) if affine else None,
            )
        levels = () if num_levels == 1 else (num_levels,)
        for name in ('running_mean', 'running_var'):
            self.register_buffer(name, torch.empty(*levels, num_features, **factory))
        self.register_buffer(
            'num_batches_tracked',
            torch.empty(levels, dtype=torch.long, device=device),
        )
        self._levels = LevelCounter(num_levels) if num_levels > 1 else None
        self.reset_parameters()

    @property
    def process_group(self) -> Optional['dist.ProcessGroup']:
        """ProcessGroup, optional: The ranks of ``sync``; None for all."""
        return self._ranks.group

    @process_group.setter
    def process_group(self, group: Optional['dist.ProcessGroup']) -> None:
        self._ranks = _Ranks(group)

    @property
    def num_features(self) -> int:
        """int: The number of channels, by BatchNorm's name for it."""
        return self.num_channels

    @property
    def level(self) -> int:
        """int: Which pyramid level the last call was for."""
        return self._levels.last if self._levels else 0

    def reset_running_stats(self) -> None:
        """Set the estimates to mean 0 and variance 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set both stages to identity and the estimates to their start."""
        if not hasattr(self, 'running_mean'):
            return  # called by nn.GroupNorm's constructor
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
            nn.init.ones_(self.batch_weight)
            nn.init.zeros_(self.batch_bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; in training mode move the estimates first."""
        # not as attributes, which nn.Module looks up in Python, one by one
        buffers = self._buffers
        mean, var, passes = (
            buffers['running_mean'],
            buffers['running_var'],
            buffers['num_batches_tracked'],
        )
        if self._levels:
            level = self._levels.next(input)
            mean, var, passes = mean[level], var[level], passes[level]
        return batch_channel_norm(
            input,
            self.num_groups,
            mean,
            var,
            self.batch_weight,
            self.batch_bias,
            self.weight,
            self.bias,
            training=self.training,
            estimate=self.estimate,
            momentum=self.momentum,
            start=self.start,
            eps=self.eps,
            num_batches_tracked=passes,
            group=self._group() if self.sync and self.training else None,
        )

    def train(self, mode: bool = True) -> 'BCN':
        if self._levels:
            self._levels.reset()
        if not mode:
            frozen.forget(self)
        elif self.weight is not None and not self.weight.requires_grad:
            frozen.watch(self)
        return super().train(mode)

    def _group(self) -> Optional['dist.ProcessGroup']:
        """The ranks to synchronise with, None if there are no others."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def extra_repr(self) -> str:
        return (
            f'{self.num_channels}, num_groups={self.num_groups}, '
            f'eps={self.eps}, momentum={self.momentum}, '
            f'start={self.start!r}, affine={self.affine}, '
            f'estimate={self.estimate}, num_levels={self.num_levels}, '
            f'sync={self.sync}'
        )

    def _load_from_state_dict(
        self,
        state_dict: State,
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        layout = self._adopt(state_dict, prefix)
        if layout:
            load_report(missing_keys).norm(layout)
        fill_num_batches_tracked(state_dict, prefix, self.momentum)
        self._expand_over_levels(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _expand_over_levels(self, state_dict: State, prefix: str) -> None:
        """Start every level from the one estimate that a state has."""
        for name in ('running_mean', 'running_var', 'num_batches_tracked'):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if given is not None and given.shape == own.shape[1:]:
                # not a view: loading may assign it, and then it moves
                state_dict[prefix + name] = given.expand_as(own).clone()

    def _adopt(self, state_dict: State, prefix: str) -> Optional[str]:
        """Rename what another layout holds for this layer, in place.

        Returns:
            str, optional: That layout, as ``layout_of`` calls it; None if the
            state is in this layer's own, or in none that it knows.
        """
        layout = layout_of(state_dict, prefix, self.num_channels)
        if layout in (None, 'own'):
            return None
        if layout == 'BatchNorm':
            if self.affine:
                adopt_batch_norm(state_dict, prefix, self.num_groups, self.eps)
        elif layout == 'GroupNorm':
            if not self.affine:
                return None
            adopt_group_norm(state_dict, prefix, self.num_groups, self.eps)
        else:
            adopt_authors(state_dict, prefix, layout)
        name = prefix + 'num_batches_tracked'
        if name not in state_dict:
            device = state_dict[prefix + 'running_mean'].device
            state_dict[name] = torch.zeros((), dtype=torch.long, device=device)
        return layout
