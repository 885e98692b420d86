"""Layouts in which checkpoints hold norms, and reading them into BCN's.

One norm at a time: the entries of a state dict below a prefix. Whole
checkpoints of the authors are converted in :mod:`bcn_mm.weights.authors`.
"""

import math
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

#: A state dict: name -> tensor.
State = Dict[str, Tensor]

#: What BCN calls its entries -> what the authors call theirs: the channel
#: stage beside an inner BatchNorm.
AUTHORS = {
    'weight': 'weight',
    'bias': 'bias',
    'batch_weight': '{inner}.weight',
    'batch_bias': '{inner}.bias',
    'running_mean': '{inner}.running_mean',
    'running_var': '{inner}.running_var',
    'num_batches_tracked': '{inner}.num_batches_tracked',
}
#: What they call that: in their ImageNet and DeepLab code, in later code.
INNER = ('pbn', 'bn')
#: The rate of their estimates, a setting of the training loop that one
#: version keeps in the state; ours is an argument of the layer.
RATE = 'estbn_moving_speed'


def layout_of(state: State, prefix: str, channels: int) -> Optional[str]:
    """The layout of the norm at ``prefix``.

    Args:
        state (dict): Name -> tensor.
        prefix (str): Of the norm's entries, ``''`` or with a dot at its end.
        channels (int): C, which tells GroupNorm's entries from others.

    Returns:
        str, optional: ``'own'``, ``'pbn'`` or ``'bn'`` (the authors', by the
        name of its inner norm), ``'BatchNorm'`` or ``'GroupNorm'``; None if
        it is in none of them.
    """
    if prefix + 'batch_weight' in state:
        return 'own'
    for inner in INNER:
        if f'{prefix}{inner}.running_mean' in state:
            return inner
    if prefix + 'running_mean' in state:
        return 'BatchNorm'
    pair = [state.get(prefix + name) for name in ('weight', 'bias')]
    if all(getattr(t, 'shape', None) == (channels,) for t in pair):
        return 'GroupNorm'
    return None


def adopt_authors(state: State, prefix: str, inner: str) -> None:
    """Rename the authors' entries at ``prefix``, in place.

    Args:
        state (dict): Name -> tensor.
        prefix (str): Of the norm's entries, ``''`` or with a dot at its end.
        inner (str): What the inner norm is called, one of :data:`INNER`.
    """
    for own, theirs in AUTHORS.items():
        theirs = prefix + theirs.format(inner=inner)
        if theirs in state:
            value = state.pop(theirs)
            if own in ('weight', 'bias') and value.dim() == 3:
                value = value.flatten()
            state[prefix + own] = value
    state.pop(f'{prefix}{inner}.{RATE}', None)


def _restoring_affine(
    weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tuple[Tensor, Tensor]:
    r"""The channel stage's affine pair that undoes its normalization.

    For channels of mean :math:`\beta_c` and standard deviation
    :math:`\gamma_c`, as the batch stage makes them, each group gets back the
    scale and offset that are taken from it:

    .. math:: \gamma_g = \sqrt{mean(\gamma_c^2) + var(\beta_c) + eps},
              \quad \beta_g = mean(\beta_c)
    """
    # float16 has neither room for squares nor for eps
    precise = torch.promote_types(weight.dtype, torch.float32)
    w, b = (t.to(precise).view(groups, -1) for t in (weight, bias))
    scale = w.square().mean(1) + b.var(1, unbiased=False) + eps
    return scale.sqrt().to(weight.dtype), b.mean(1).to(bias.dtype)


def adopt_batch_norm(state: State, prefix: str, groups: int, eps: float) -> None:
    """Put BatchNorm's entries into the batch stage, in place.

    The channel stage becomes the identity for groups whose statistics are
    those that the affine pairs give them (:func:`_restoring_affine`), and so
    in the mean over what the BatchNorm was trained on. With weight 1 and bias
    0 it would bring every group to variance 1, the last norms of residual
    branches too, whose weights start at 0 and stay small.

    ``docs/notes/norm_layouts.md`` has what both do to a ResNet-18.

    Args:
        state (dict): Name -> tensor.
        prefix (str): Of the norm's entries, ``''`` or with a dot at its end.
        groups (int): G of the channel stage.
        eps (float): Of the BCN.
    """
    pair = []
    for name in ('weight', 'bias'):
        if prefix + name in state:
            pair.append(state.pop(prefix + name))
            state[f'{prefix}batch_{name}'] = pair[-1]
    if len(pair) < 2:
        return
    if pair[0].shape == pair[1].shape and pair[0].numel() % groups == 0:
        pair = _restoring_affine(*pair, groups, eps)
    else:  # refused when it is loaded, for the shape of batch_weight
        pair = pair[0].new_ones(groups), pair[0].new_zeros(groups)
    state[prefix + 'weight'], state[prefix + 'bias'] = pair


def adopt_group_norm(state: State, prefix: str, groups: int, eps: float) -> None:
    r"""Put GroupNorm's per-channel affine pair where it does least harm.

    BCN has no affine pair per channel behind its channel stage, so a GroupNorm
    cannot be expressed in it. The pair goes into the batch stage, and the
    channel stage gives each group back the scale and offset that it takes
    away (:func:`_restoring_affine`), those of channels with mean 0 and
    variance 1. Estimates start at mean 0 and variance 1, where the batch stage
    does nothing but apply the pair.

    ``docs/notes/norm_layouts.md`` has how far that is from GroupNorm.

    Args:
        state (dict): Name -> tensor.
        prefix (str): Of the norm's entries, ``''`` or with a dot at its end.
        groups (int): G of the channel stage.
        eps (float): Of the BCN.
    """
    weight, bias = (state.pop(prefix + name) for name in ('weight', 'bias'))
    state[prefix + 'batch_weight'] = weight
    state[prefix + 'batch_bias'] = bias
    pair = _restoring_affine(weight, bias, groups, eps)
    state[prefix + 'weight'], state[prefix + 'bias'] = pair
    state[prefix + 'running_mean'] = torch.zeros_like(weight)
    state[prefix + 'running_var'] = torch.ones_like(weight)


def fill_num_batches_tracked(
    state: State, prefix: str, momentum: Optional[float]
) -> None:
    """Let estimates of unknown age be moved, not replaced, by ``start``.

    Many checkpoints of BatchNorm do not say how many passes theirs saw. In
    place; estimates that are still at 0 and 1 have seen none.

    Args:
        state (dict): Name -> tensor, in BCN's own layout.
        prefix (str): Of the norm's entries, ``''`` or with a dot at its end.
        momentum (float, optional): Of the BCN.
    """
    names = ('num_batches_tracked', 'running_mean', 'running_var')
    passes, mean, var = (state.get(prefix + name) for name in names)
    if passes is None or mean is None or var is None:
        return
    if passes.is_meta or mean.is_meta or var.is_meta or passes.any():
        return
    if mean.any() or (var != 1).any():
        age = math.ceil(1 / momentum) if momentum else 1
        state[prefix + names[0]] = torch.full_like(passes, age)
