"""Layouts in which checkpoints hold norms, and reading them into BCN's.

One norm at a time: the entries of a state dict below a prefix. Whole
checkpoints are the business of :mod:`bcn_mm.weights.authors`.
"""

import logging
from typing import Dict, Optional, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor

State = Dict[str, Tensor]

#: What BCN calls its entries, and the authors theirs: the channel stage
#: beside an inner BatchNorm, which their ImageNet and DeepLab code calls
#: ``pbn`` and their later code ``bn``.
AUTHORS = {
    'weight': 'weight',
    'bias': 'bias',
    'batch_weight': '{inner}.weight',
    'batch_bias': '{inner}.bias',
    'running_mean': '{inner}.running_mean',
    'running_var': '{inner}.running_var',
    'num_batches_tracked': '{inner}.num_batches_tracked',
}
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
    """Rename the authors' entries at ``prefix``, in place."""
    for own, theirs in AUTHORS.items():
        theirs = prefix + theirs.format(inner=inner)
        if theirs in state:
            value = state.pop(theirs)
            if own in ('weight', 'bias') and value.dim() == 3:
                value = value.flatten()
            state[prefix + own] = value
    state.pop(f'{prefix}{inner}.{RATE}', None)


def _restoring(
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


def adopt_batch_norm(
    state: State, prefix: str, groups: int, eps: float
) -> None:
    """Put BatchNorm's entries into the batch stage, in place.

    The channel stage becomes the identity for groups whose statistics are
    those that the affine pairs give them (:func:`_restoring`), and so in the
    mean over what the BatchNorm was trained on. With weight 1 and bias 0 it
    would bring every group to variance 1, the last norms of residual branches
    too, whose weights start at 0 and stay small.

    How far the outputs of the four stages of a ResNet-18 are from those with
    BatchNorm, relative to their norm (20 pictures of COCO train2017 at
    128x128, evaluation mode; trained: 120 steps of RetinaNet with 4 of 40
    others; random: weights of 0 to 0.5, biases of sd 0.2, estimates of those
    40):

    =======================  ======================  ==================
    affine pairs             channel stage 1 and 0   as here
    =======================  ======================  ==================
    trained                  1.21, 1.60, 1.56, 1.48  .29, .39, .45, .51
    random                   2.12, 2.37, 2.52, 2.36  .32, .44, .51, .55
    =======================  ======================  ==================
    """
    pair = []
    for name in ('weight', 'bias'):
        if prefix + name in state:
            pair.append(state.pop(prefix + name))
            state[f'{prefix}batch_{name}'] = pair[-1]
    if len(pair) < 2:
        return
    if pair[0].shape == pair[1].shape and pair[0].numel() % groups == 0:
        pair = _restoring(*pair, groups, eps)
    else:  # refused when it is loaded, for the shape of batch_weight
        pair = pair[0].new_ones(groups), pair[0].new_zeros(groups)
    state[prefix + 'weight'], state[prefix + 'bias'] = pair


def adopt_group_norm(
    state: State, prefix: str, groups: int, eps: float
) -> None:
    r"""Put GroupNorm's per-channel affine pair where it does least harm.

    BCN has no affine pair per channel behind its channel stage, so a GroupNorm
    cannot be expressed in it. The pair goes into the batch stage, and the
    channel stage gives each group back the scale and offset that it takes
    away (:func:`_restoring`), those of channels with mean 0 and variance 1.
    Estimates start at mean 0 and variance 1, where the batch stage does
    nothing but apply the pair.

    How much that changes the outputs of the four stages of a ResNet-18 (GN
    with 32 groups and WS, 40 pictures of COCO val2017 at 128x128, evaluation
    mode), relative to their norm, right after loading and after 80 more
    training pictures without weight updates, by which the estimates have
    become those of the pictures:

    ======================================  ===================  ==============
    affine pairs of GN, and where they go   after loading        80 pictures on
    ======================================  ===================  ==============
    random, sd 0.3: left out                .48, .77, .89, .93   .51 ... .95
    random: batch stage, channel identity   .41, .65, .78, .84   .42 ... .83
    random: as here                         .23, .45, .62, .75   .29 ... .78
    trained, sd 0.04, 0.02: left out        .04, .06, .07, .11   .15 ... .42
    trained: batch stage, channel identity  .04, .05, .05, .08   .14 ... .41
    trained: as here                        .02, .03, .04, .06   .14 ... .40
    ======================================  ===================  ==============

    (The trained one had 300 steps of 8 pictures of COCO, their classes as
    labels; published weights could not be had for this.)
    """
    weight, bias = (state.pop(prefix + name) for name in ('weight', 'bias'))
    state[prefix + 'batch_weight'] = weight
    state[prefix + 'batch_bias'] = bias
    pair = _restoring(weight, bias, groups, eps)
    state[prefix + 'weight'], state[prefix + 'bias'] = pair
    state[prefix + 'running_mean'] = torch.zeros_like(weight)
    state[prefix + 'running_var'] = torch.ones_like(weight)


_READING = {
    'BatchNorm': "BatchNorm's layout (it goes into the batch stage; the "
    'channel stage restores the scale and offset of each group)',
    'GroupNorm': "GroupNorm's layout (an approximation: its affine pairs go "
    'into the batch stage, the channel stage restores the scale and offset '
    'of each group, estimates start at 0 and 1)',
    'authors': "the authors' layout",
}
_UNMARKED = {
    'BatchNorm': 'the checkpoint is of a BatchNorm model and does not say '
    'that it was trained with weight standardization: unless it was, its '
    'convolutions have other weights in this model (dialect={0!r}) and need '
    'training',
    'GroupNorm': 'the checkpoint does not say whether it was trained with '
    "weight standardization; it is read as dialect={0!r} (mmcv's ConvWS, and "
    "so jhu/*_gn_ws, is 'std')",
    'authors': 'the checkpoint does not say its dialect of weight '
    "standardization; it is read as {0!r} (the authors' ImageNet models are "
    "'var', their detection and DeepLab models 'std'; "
    'tools/model_converters/authors_to_mm.py writes it down)',
}


class _Load:
    """What the layers of one ``load_state_dict`` say about it, once.

    All layers of one call are handed the same list of missing keys, and no
    two calls are while that list is referenced.
    """

    def __init__(self) -> None:
        self._keys = self._layout = self._dialect = None
        self._said = False

    def _enter(self, missing_keys: list) -> None:
        if self._keys is not missing_keys:
            self.__init__()
            self._keys = missing_keys

    def norm(self, missing_keys: list, layout: str) -> None:
        """A BCN was read from the state of another layout."""
        self._enter(missing_keys)
        if self._layout is None:
            self._layout = 'authors' if layout in INNER else layout
            self._say(
                f'BCN: the checkpoint is in {_READING[self._layout]}; reading '
                f'it into the stages of every BCN layer that it has a norm for'
            )
        self._compare()

    def conv(self, missing_keys: list, dialect: str) -> None:
        """A WSConv was read from a state that names no dialect."""
        self._enter(missing_keys)
        self._dialect = dialect
        self._compare()

    def _compare(self) -> None:
        if self._layout and self._dialect and not self._said:
            self._said = True
            self._say(
                f'WSConv: {_UNMARKED[self._layout].format(self._dialect)}'
            )

    def _say(self, text: str) -> None:
        print_log(text, logger='current', level=logging.INFO)


loading = _Load()
