"""Batch-Channel Normalization in one pass.

Both stages are affine in ``x`` once the moments of every (sample, channel)
are known. So a forward pass reads ``x`` for its moments, does the algebra of
:mod:`.stages` on (N, C) tensors, and reads ``x`` once more to write ``y``; a
backward pass reads ``dy`` and ``x`` twice. The passes over tensors of full
size are those of a backend (:mod:`.kernels`), the estimates move in between
(:mod:`.estimates`), and of full size only ``x`` is kept.
"""

import operator
from contextlib import nullcontext
from typing import Any, ContextManager, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import portable, recomputation, rematerialization, stages
from ._compat import is_autocast_enabled, is_compiling, is_transforming, uncompiled
from .estimates import Rule, Running, batch_of, repeated_by_others, unmoving
from .kernels import Eager, is_empty, kernels_for
from .layout import compute_dtype, dense, in_layout_of, to_dtype
from .recipes import NormRecipe
from .stages import Affine, Batch, Moments, Spec


def default_num_groups(num_channels: int) -> int:
    """The group count that ``num_groups=None`` stands for.

    32 where that leaves two or more channels in each group, else the largest
    divisor of ``num_channels`` that divides 32 and does, else 1.

    Example:
        >>> [default_num_groups(c) for c in (256, 72, 32, 6, 3)]
        [32, 8, 16, 2, 1]
    """
    for groups in (32, 16, 8, 4, 2):
        if num_channels % groups == 0 and num_channels // groups >= 2:
            return groups
    return 1


def check_num_groups(num_groups: int, num_channels: int) -> None:
    """Raise unless ``num_groups`` is a divisor of ``num_channels``.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it does not divide the number of channels.
    """
    try:
        operator.index(num_groups)
    except TypeError:
        raise TypeError(
            f'num_groups must be an integer, but got {num_groups!r}'
        ) from None
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(
            f'num_groups must be a divisor of the number of channels, but '
            f'num_groups={num_groups} does not divide {num_channels}'
        )


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Optional[Tensor] = None,
    batch_bias: Optional[Tensor] = None,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    training: bool = False,
    estimate: bool = True,
    momentum: Optional[float] = 0.01,
    start: str = 'identity',
    eps: float = 1e-5,
    num_batches_tracked: Optional[Tensor] = None,
    group: Optional['dist.ProcessGroup'] = None,
) -> Tensor:
    r"""Batch-Channel Normalization.

    With :math:`m_{nc}, v_{nc}` the mean and biased variance of ``x`` over its
    spatial positions, the *batch stage* is

    .. math:: z = \gamma_b \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_b

    where, for ``estimate=True`` (micro-batch BCN), :math:`\mu, \sigma^2` are
    running estimates, constants to autograd, that training first moves by

    .. math::
        \hat\mu &\leftarrow \hat\mu + r (\text{mean}_n m - \hat\mu) \\
        \hat\sigma^2 &\leftarrow \hat\sigma^2 + r
            (\text{mean}_n [v + (m - \hat\mu_{\text{old}})^2]
            - \hat\sigma^2)

    and, for ``estimate=False`` (large-batch BCN), those of ``nn.BatchNorm2d``:
    batch statistics in training, running ones (unbiased variance) else. The
    *channel stage* normalizes ``z`` as ``F.group_norm`` does, over the
    channels of a group and space, with one affine pair per **group**:

    .. math:: y = \gamma_c \frac{z - M_{ng}}{\sqrt{V_{ng}+\epsilon}} + \beta_c

    Source: Qiao et al., arXiv:1911.09738, and arXiv:1903.10520v2, alg. 1.

    Args:
        x (Tensor): ``(N, C, *spatial)`` with 0 to 3 spatial dimensions, float16,
            bfloat16, float32 or float64. Statistics and all that follows from
            them are computed in float32 (float64 for float64).
        num_groups (int): The number of groups G, a divisor of C.
        running_mean (Tensor): (C), moved in place in training.
        running_var (Tensor): likewise.
        batch_weight (Tensor, optional): :math:`\gamma_b`, (C).
        batch_bias (Tensor, optional): :math:`\beta_b`, (C).
        weight (Tensor, optional): :math:`\gamma_c`, (G).
        bias (Tensor, optional): :math:`\beta_c`, (G); given together with
            ``weight`` or not at all.
        training (bool): Whether estimates move. Default: False.
        estimate (bool): Which batch stage. Default: True.
        momentum (float, optional): The update rate r in [0, 1]; None for the
            cumulative average of all passes. Default: 0.01.
        start (str): How estimates begin. ``'identity'``, as in the paper's
            code: at whatever they hold, 0 and 1 in a new layer. ``'first'``:
            the first pass replaces them. ``'average'``: they are the average
            of all passes until 1 / n, n being their number, falls below r.
            While the rate is above r, the variance becomes that of the
            mixture of old and new, :math:`r^2 (\text{mean}_n m -
            \hat\mu_{\text{old}})^2` less than above; likewise with
            ``momentum=None``. Default: ``'identity'``.
        eps (float): :math:`\epsilon` of both stages. Default: 1e-5.
        num_batches_tracked (Tensor, optional): An integer scalar, counts the
            training passes.
        group (ProcessGroup, optional): In training, take the batch statistics
            over the batches of all its ranks: those of one process with all
            samples, whatever their number on each rank, none included. Every
            rank must make the same passes in the same order; each costs one
            ``all_reduce`` of 2 C + 1 float64 numbers and, with
            ``estimate=False``, one of 2 C numbers in the backward pass. The
            running statistics must be equal on all ranks to begin with.

    Returns:
        Tensor: of the shape, dtype and memory layout of ``x``,
        differentiable once. An empty ``x`` gives an empty result and moves no
        estimate; channels whose batch statistics are not finite keep their
        last finite estimates.

        A pass that ``torch.utils.checkpoint`` repeats in the backward pass
        moves nothing and sees the statistics of the pass that it repeats. A
        pass that something else repeats there moves nothing either, but sees
        the estimates as they then are; that is said once.

    Raises:
        TypeError: if ``x`` is not floating or ``num_groups`` no integer.
        ValueError: if ``x`` is not 2- to 5-dimensional, ``running_mean`` or
            ``running_var`` is not of shape (C), or ``num_groups`` does not
            divide C.
        RuntimeError: if a training pass is exported or traced, or compiled
            as a whole with an activation checkpoint around this.

    Example:
        >>> x = torch.randn(1, 6, 4, 4)
        >>> mean, var = torch.zeros(6), torch.ones(6)
        >>> y = batch_channel_norm(x, 2, mean, var, training=True)
        >>> y.shape, bool((mean != 0).all())
        (torch.Size([1, 6, 4, 4]), True)
    """
    affine = Affine(batch_weight, batch_bias, weight, bias)
    spec = Spec(num_groups, eps)
    if portable.exporting():
        if training:
            raise RuntimeError(
                'a training pass of BCN moves its estimates and cannot be '
                'traced or exported: call model.eval() first'
            )
        return portable.evaluate(x, running_mean, running_var, affine, spec)
    if not 2 <= x.dim() <= 5:
        raise ValueError(
            f'expected an input of 2 to 5 dimensions (N, C, '
            f'*spatial), but got shape {tuple(x.shape)}'
        )
    if not x.is_floating_point():
        raise TypeError(f'expected a floating input, but got {x.dtype}')
    if not x.shape[1:2] == running_mean.shape == running_var.shape:
        raise ValueError(
            f'expected {running_mean.numel()} channels, but got an input of shape '
            f'{tuple(x.shape)} and running statistics of shapes '
            f'{tuple(running_mean.shape)} and {tuple(running_var.shape)}'
        )
    check_num_groups(num_groups, x.shape[1])
    if not training:
        group = None
    if is_empty(x) and group is None:
        # stay in the graph, so that every parameter gets its zero gradient
        anchor = sum(0 * p.sum() for p in affine if p is not None)
        return (x + anchor).to(x.dtype)
    rule = Rule(training, estimate, momentum, start, eps)
    # evaluation does not ask where the counter is: some checkpoints have none
    passes = num_batches_tracked if training else None
    running = Running(running_mean, running_var, passes)
    if is_compiling() and recomputation.active:
        # only Python knows what a checkpoint repeats
        return uncompiled(_normalize)(x, running, rule, affine, spec, group)
    return _normalize(x, running, rule, affine, spec, group)


def _normalize(
    x: Tensor,
    running: Running,
    rule: Rule,
    affine: Affine,
    spec: Spec,
    group: Optional['dist.ProcessGroup'],
) -> Tensor:
    x = dense(x)
    affine = Affine(*to_dtype(compute_dtype(x), *affine))
    kernels = kernels_for(x)
    if kernels.fused and group is None:
        known, repeats = None, False
        if recomputation.is_on():
            running, rule, known, repeats = _taped(x, running, rule)
        how = running, rule, spec, known, repeats, kernels
        if torch.is_grad_enabled():
            if rematerialization.watching:
                recipe = _recipe_of(x, kernels)
                return _followed(_Fused.apply(x, *affine, *how, recipe), recipe)
            return _Fused.apply(x, *affine, *how, None)
        return kernels.forward(x, running, rule, affine, spec, known, repeats)[0]
    return _pass_by_pass(x, running, rule, affine, spec, kernels, group)


def _pass_by_pass(
    x: Tensor,
    running: Running,
    rule: Rule,
    affine: Affine,
    spec: Spec,
    kernels: Eager,
    group: Optional['dist.ProcessGroup'],
) -> Tensor:
    with _autocast_off(x):
        with torch.no_grad():
            # constants to derivatives in forward mode too, which no_grad lets through
            moments = kernels.moments(x.detach() if is_transforming() else x)
            batch = batch_of(moments, x.shape[2:].numel(), running, rule, group)
        if is_transforming():
            return portable.differentiable(x, batch, affine, spec)
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *affine)
        ):
            y = _BatchChannelNorm.apply(x, *affine, *moments, *batch, *spec, group)
            if not is_compiling() and rematerialization.watching:
                recipe = _recipe_of(x, kernels)
                if recipe is not None:
                    with torch.no_grad():
                        coef = stages.forward(moments, batch, affine, spec)
                    recipe.moments, recipe.coef = moments, coef
                return _followed(y, recipe)
            return y
        return kernels.normalize(x, moments, batch, affine, spec)


def _recipe_of(x: Tensor, kernels: Eager) -> Optional[NormRecipe]:
    """How to compute a pass over ``x`` again, if somebody wants to know."""
    region = rematerialization.current()
    if region is None or is_empty(x):
        return None
    if recomputation.is_on():  # nothing of this pass is kept
        return None
    return NormRecipe(kernels, x, region.pack)


def _followed(y: Tensor, recipe: Optional[NormRecipe]) -> Tensor:
    region = rematerialization.current()
    if recipe is not None and region is not None and y.requires_grad:
        region.follow(y, recipe)
    return y


def _taped(
    x: Tensor, running: Running, rule: Rule
) -> Tuple[Running, Rule, Optional[Tensor], bool]:
    """The arguments of ``Eager.forward`` for a pass that is, or has, a repetition."""
    if repeated_by_others(rule):
        return running._replace(num_batches_tracked=None), unmoving(rule), None, False
    own = x.new_empty(2, x.shape[1], dtype=torch.float64)
    # filled by the pass, whose mode the layer may have left by its repetition
    batch, rule = recomputation.once(lambda: (own, rule))
    return running, rule, batch, batch is not own


def _autocast_off(x: Tensor) -> ContextManager:
    """A context in which statistics keep their dtype, free if it is so."""
    kind = x.device.type
    if kind == 'meta' or not is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class _BatchChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        batch_weight: Optional[Tensor],
        batch_bias: Optional[Tensor],
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        mean: Tensor,
        var: Tensor,
        far: bool,
        batch_mean: Tensor,
        inv_std: Tensor,
        num_values: Optional[Union[int, Tensor]],
        num_groups: int,
        eps: float,
        relu: bool,
        group: Optional['dist.ProcessGroup'],
    ) -> Tensor:
        spec = Spec(num_groups, eps, relu)
        is_tensor = isinstance(num_values, Tensor)
        ctx.save_for_backward(
            x,
            mean,
            var,
            batch_mean,
            inv_std,
            batch_weight,
            batch_bias,
            weight,
            bias if spec.relu else None,  # else it may move, as in all norms
            num_values if is_tensor else None,
        )
        ctx.far, ctx.num_values = far, None if is_tensor else num_values
        ctx.settings = spec, group
        return kernels_for(x).normalize(
            x,
            Moments(mean, var, far),
            Batch(batch_mean, inv_std, num_values),
            Affine(batch_weight, batch_bias, weight, bias),
            spec,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, mean, var, batch_mean, inv_std, *rest = ctx.saved_tensors
        *affine, num_values = rest
        spec, group = ctx.settings
        if num_values is None:
            num_values = ctx.num_values
        dy, kernels = in_layout_of(dy, x), kernels_for(x)
        known = (
            Moments(mean, var, ctx.far),
            Batch(batch_mean, inv_std, num_values),
            Affine(*affine),
            spec,
        )
        sums = kernels.backward_reduce(dy, x, *known)
        dx = None
        if ctx.needs_input_grad[0]:
            if num_values is not None and group is not None:
                along = torch.stack(sums.along)
                dist.all_reduce(along, group=group)
                d_shift, d_factor = along.unbind()
                sums = sums._replace(along=(d_shift, d_factor))
            dx = kernels.backward_input(dy, x, sums, *known)
        return (dx, *sums.affine, *[None] * 10)


class _Fused(torch.autograd.Function):
    """The passes of a backend that makes them in one call each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        batch_weight: Optional[Tensor],
        batch_bias: Optional[Tensor],
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        running: Running,
        rule: Rule,
        spec: Spec,
        batch: Optional[Tensor],
        repeats: bool,
        kernels: Eager,
        recipe: Optional[NormRecipe],
    ) -> Tensor:
        affine = Affine(batch_weight, batch_bias, weight, bias)
        coef = None if recipe is None else recipe.room_for(x, compute_dtype(x))
        y, saved = kernels.forward(x, running, rule, affine, spec, batch, repeats, coef)
        if recipe is not None:
            recipe.note(x, saved[0])
        # the bias may move before the backward pass, as in all norms
        kept = bias if spec.relu else None
        ctx.save_for_backward(x, batch_weight, batch_bias, weight, kept, *saved)
        ctx.kernels, ctx.settings = kernels, (rule, spec)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
        # entering no_grad takes as long as a small map does, so only if it must
        if torch.is_grad_enabled():
            return once_differentiable(_fused_backward)(ctx, dy)
        return _fused_backward(ctx, dy)


def _fused_backward(ctx: Any, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, batch_weight, batch_bias, weight, bias, *saved = ctx.saved_tensors
    affine = Affine(batch_weight, batch_bias, weight, bias)
    dx, grads = ctx.kernels.backward(
        in_layout_of(dy, x), x, saved, affine, *ctx.settings, ctx.needs_input_grad[0]
    )
    return (dx, *grads, *[None] * 7)
