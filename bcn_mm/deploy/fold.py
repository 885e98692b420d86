"""Folding for inference: no batch stages, no standardization of weights."""

import copy
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..layers import BCN, WS_CONVS
from ..layers.levels import LevelCounter
from ..layers.replace import take_hooks
from ..ops import affine_group_norm, batch_affine
from ..ops._compat import tree_leaves
from .compare import largest_difference
from .dataflow import ConvTracer, obstacle_of

_PLAIN = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Folding(NamedTuple):
    """What :func:`fold` did with one layer.

    Attributes:
        norm (str, optional): The BCN; None for a convolution without one.
        conv (str, optional): The convolution that its batch stage went into,
            or that became a plain one; None if the batch stage stays.
        note (str): Why it stays.
    """

    norm: Optional[str]
    conv: Optional[str]
    note: str = ''


class AffineGroupNorm(nn.GroupNorm):
    """A BCN in evaluation mode whose batch stage could not be folded.

    ``y = GroupNorm(scale x + shift)``, everything per channel.

    Args:
        norm (BCN): What it stands for; with ``num_levels`` more than one,
            the levels are told apart as there.

    Shape:
        - Input: ``(N, C, *spatial)`` with 0 to 3 spatial dimensions.
        - Output: the shape of the input.

    Attributes:
        weight: (C), or None without affine parameters.
        bias: Likewise.
        scale: (C), or (num_levels, C).
        shift: Likewise.
    """

    def __init__(self, norm: BCN) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        many = norm.num_levels > 1
        self._levels = LevelCounter(norm.num_levels) if many else None
        dtype = norm.running_mean.dtype
        for name, value in zip(('scale', 'shift'), _batch_stage(norm)):
            self.register_buffer(name, value.to(dtype))
        _copy_channel_stage(self, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``."""
        scale, shift = self.scale, self.shift
        if self._levels:
            level = self._levels.next(x)
            scale, shift = scale[level], shift[level]
        return affine_group_norm(
            x, self.num_groups, scale, shift, self.weight, self.bias, self.eps
        )


@torch.no_grad()
def fold(
    model: nn.Module,
    *inputs: Any,
    run: Optional[Callable[..., Any]] = None,
    report: Optional[List[Folding]] = None,
) -> nn.Module:
    r"""Make a model for inference that has neither batch stages nor WS.

    In evaluation the batch stage is :math:`z = a x + b` per channel, with
    :math:`a = \gamma_b / \sqrt{\sigma^2 + \epsilon}` and :math:`b = \beta_b -
    \mu a`. Where ``x`` is the output of a convolution, a goes into its
    (standardized) weight and b into its bias, and what is left of the BCN is
    an ``nn.GroupNorm``. Every other standardized convolution becomes a plain
    one. The result equals the model up to rounding and has standard layers
    only, but for :class:`AffineGroupNorm`, see below.

    Which convolution comes before which norm is not guessed: one forward pass
    is watched, and the batch stage stays, as an explicit affine, unless in
    every call the norm's input was the very output of one convolution and
    nothing else saw that output. It also stays if the norm has estimates for
    several levels, or hooks, which then see what they saw before. So the pass
    has to be one that uses all of the model; a norm that nothing passed through
    keeps its batch stage. Another pass then compares the result with the model.

    Args:
        model (nn.Module): In evaluation mode; it is left as it is.
        *inputs: What a forward pass takes, a batch of pictures for instance.
        run (callable, optional): Makes that pass as ``run(model, *inputs)``.
            Default: ``model(*inputs)``.
        report (list, optional): Receives a :class:`Folding` per norm and per
            other standardized convolution.

    Returns:
        nn.Module: A folded copy of ``model``.

    Raises:
        ValueError: if a part of ``model`` is in training mode.
        RuntimeError: if the result differs from the model.

    Example:
        >>> model = nn.Sequential(WSConv2d(3, 8, 3), BCN(8)).eval()
        >>> folded = fold(model, torch.randn(1, 3, 9, 9))
        >>> [type(layer).__name__ for layer in folded]
        ['Conv2d', 'GroupNorm']
    """
    training = [n for n, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f'only models in evaluation mode can be folded, but '
            f'{training[0] or "the model"} is in training mode'
        )
    run = run or (lambda model, *inputs: model(*inputs))
    model, original = copy.deepcopy(model), model
    tracer = ConvTracer(model)
    with tracer:
        output = run(model, *inputs)
    tracer.finish(output)
    names = {m: name for name, m in model.named_modules()}
    replacement, foldings = {}, []
    for norm in (m for m in names if isinstance(m, BCN)):
        conv, reason = tracer.source_of(norm)
        if conv is None:
            replacement[norm] = AffineGroupNorm(norm).eval()
            take_hooks(replacement[norm], norm)
            foldings.append(Folding(names[norm], None, reason))
            continue
        replacement[norm] = nn.GroupNorm(
            norm.num_groups, norm.num_channels, norm.eps, norm.affine
        )
        _copy_channel_stage(replacement[norm], norm)
        replacement[conv] = _folded(conv, tracer.convs[conv].weight, norm)
        foldings.append(Folding(names[norm], names[conv]))
    for conv in (m for m in names if isinstance(m, WS_CONVS)):
        if conv not in replacement and not obstacle_of(conv):
            weight = conv.standardized_weight()
            replacement[conv] = plain_conv(conv, weight, conv.bias)
            foldings.append(Folding(None, names[conv]))
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in replacement:
                module._modules[name] = replacement[child]
    model = replacement.get(model, model)
    _check_equal(output, run(model, *inputs), run(original, *inputs))
    if report is not None:
        report += foldings
    return model


def plain_conv(conv: nn.Module, weight: Tensor, bias: Optional[Tensor]) -> nn.Module:
    """Make a plain convolution with the settings of another one.

    Args:
        conv (nn.Module): A convolution, standardized for instance.
        weight (Tensor): What the new one gets a copy of,
            ``(out_channels, in_channels / groups, *kernel_size)``.
        bias (Tensor, optional): Likewise, (out_channels).

    Returns:
        nn.Module: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` in
        evaluation mode, without gradients.
    """
    plain = _PLAIN[weight.dim()](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias is not None,
        conv.padding_mode,
        device='meta',
    )
    plain.weight = _constant(weight.detach().clone())
    if bias is not None:
        plain.bias = _constant(bias.detach().clone())
    return plain.eval()


def _folded(conv: nn.Module, weight: Optional[Tensor], norm: BCN) -> nn.Module:
    """A convolution that does a norm's batch stage too."""
    scale, shift = _batch_stage(norm)
    own = conv.weight.detach() if weight is None else weight
    if isinstance(conv, _ConvTransposeNd):  # (in, out / groups, *kernel)
        axis = (conv.groups, 1, -1) + (1,) * (own.dim() - 2)
        value = own.double().unflatten(0, (conv.groups, -1)) * scale.view(axis)
        value = value.flatten(0, 1)
    else:
        value = own.double() * scale.view(-1, *(1,) * (own.dim() - 1))
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    value, shift = (t.to(own.dtype) for t in (value, shift))
    if weight is not None:
        return plain_conv(conv, value, shift)
    conv = copy.copy(conv)  # what it shares with others stays theirs
    conv._parameters = dict(weight=_constant(value), bias=_constant(shift))
    return conv


def _check_equal(watched: Any, folded: Any, original: Any) -> None:
    """Make sure that nothing but rounding has changed."""
    watched, folded, original = (
        [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for out in (watched, folded, original)
    )
    floats = [t for t in original if t.is_floating_point()]
    if not floats:
        return
    allowed = max(torch.finfo(t.dtype).eps for t in floats) ** (1 / 3)
    for result in (watched, folded):
        difference = largest_difference(result, original)
        if not difference <= allowed:
            raise RuntimeError(
                f'the folded model differs from the model: by '
                f'{difference:.1g} of the largest value'
            )


def _batch_stage(norm: BCN) -> Tuple[Tensor, Tensor]:
    """Its scale and shift, in float64."""
    tensors = (
        norm.running_mean,
        norm.running_var,
        norm.batch_weight,
        norm.batch_bias,
    )
    return batch_affine(
        *(t if t is None else t.detach().double() for t in tensors), norm.eps
    )


def _copy_channel_stage(group_norm: nn.GroupNorm, norm: BCN) -> None:
    """One affine pair per channel instead of one per group."""
    if norm.affine:
        repeats = norm.num_channels // norm.num_groups
        for name in ('weight', 'bias'):
            value = getattr(norm, name).detach().repeat_interleave(repeats)
            setattr(group_norm, name, _constant(value))
    group_norm.eval()


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
