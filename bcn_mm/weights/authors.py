"""Checkpoints of the authors, whole: conversion from and to their layout.

Single norms are read by :mod:`.norm_layouts` whenever a state dict is loaded; here
is what needs to see a whole checkpoint. The authors' layout is that of
https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization.
"""

import re
from collections import OrderedDict
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..layers.ws_conv import METADATA
from ..ops import DIALECTS, check_dialect
from ..version import __version__
from .architectures import arch_of, check_architecture, groups_of, layers_of
from .loading import dialects_of
from .norm_layouts import AUTHORS, INNER, RATE, State
from .reading import check_values

_EPS = 1e-5  # of their norms and of their weight standardization

# The authors' head -> mmseg's ASPPHead
_HEAD_TO_MMSEG = {
    **{f'aspp{i}': f'aspp_modules.{i - 1}.conv' for i in range(1, 5)},
    **{f'aspp{i}_bn': f'aspp_modules.{i - 1}.bn' for i in range(1, 5)},
    'aspp5': 'image_pool.1.conv',
    'aspp5_bn': 'image_pool.1.bn',
    'conv2': 'bottleneck.conv',
    'bn2': 'bottleneck.bn',
    'conv3': 'conv_seg',
}
_HEAD_FROM_MMSEG = {mm: theirs for theirs, mm in _HEAD_TO_MMSEG.items()}


class Converted(NamedTuple):
    """What a conversion makes.

    Attributes:
        state (OrderedDict): The converted state dict.
        meta (dict): Facts for the checkpoint's ``meta``.
        notes (list[str]): What the user should know, a line each.
    """

    state: State
    meta: dict
    notes: List[str]


def _without_module(state: State) -> State:
    """The state of what DataParallel wrapped."""
    names = [name.startswith('module.') for name in state]
    if not any(names):
        return OrderedDict(state)
    if not all(names):
        odd = list(state)[names.index(False)]
        raise ValueError(f'{odd} is outside of `module.`, where others are')
    return OrderedDict((name[7:], value) for name, value in state.items())


def _inner_of(state: State) -> str:
    """What the inner norms are called; makes sure that there are some."""
    for inner in INNER:
        for name in state:
            if name.endswith(f'.{inner}.running_mean'):
                outer = name[: -len(f'{inner}.running_mean')] + 'weight'
                if outer in state and state[outer].dim() == 3:
                    return inner
    for name in state:
        if name.endswith('.batch_weight'):
            raise ValueError(f"{name}: this is bcn_mm's layout already")
    for name in state:
        if name.endswith('.running_mean') and not name.endswith(
            tuple(f'.{inner}.running_mean' for inner in INNER)
        ):
            raise ValueError(
                f"{name}: this is BatchNorm's layout, which a BCN model loads as it is"
            )
    for name in state:
        if re.search(r'(bn|gn)\d*\.weight$', name):
            if state[name].dim() == 3:
                raise ValueError(
                    f'{name.replace("weight", "pbn.running_mean")} is missing'
                )
            raise ValueError(
                f"{name}: this is GroupNorm's layout, which a BCN model loads as it is"
            )
    raise ValueError(f"{next(iter(state))}: there are no norms of the authors'")


def _check_norm(state: State, prefix: str, inner: str) -> None:
    """One norm of a model whose architecture is not known."""
    channels = state[f'{prefix}{inner}.running_mean'].shape
    groups = state[f'{prefix}weight'].shape
    for own, theirs in AUTHORS.items():
        name = prefix + theirs.format(inner=inner)
        if own == 'num_batches_tracked':
            continue
        if name not in state:
            raise ValueError(f'{name} is missing')
        shape = groups if own in ('weight', 'bias') else channels
        if state[name].shape != shape:
            raise ValueError(
                f'{name} has shape {tuple(state[name].shape)}, beside the '
                f'rest of its norm it should have {tuple(shape)}'
            )


def from_authors(
    state: State, arch: Optional[str] = None, dialect: Optional[str] = None
) -> Converted:
    """Convert a state dict in the authors' layout to bcn_mm's.

    ImageNet models keep their names, which are those of mmdet's, mmseg's and
    mmpretrain's backbones, ``fc`` included. A DeepLabV3 becomes an mmseg
    ``EncoderDecoder`` of ``ResNet`` and ``ASPPHead``. Its head joins five
    branches by a 1x1 convolution, mmseg's by one of 3x3 and with the image
    pool first: the kernel becomes the centre of a 3x3 kernel of zeros, its
    inputs are permuted, and, since standardization divides these filters by
    less, the estimates of the norm behind it are scaled by the same factor,
    so that evaluation gives the same numbers. Other models are converted norm
    by norm if they are in OpenMMLab's names.

    Args:
        state (dict): Name -> tensor, optionally below ``module.``; is left
            as it is.
        arch (str, optional): One of :data:`.architectures.ARCHS`, which the
            names and shapes must then fit. Default: found out.
        dialect (str, optional): Of weight standardization, ``'none'`` for
            models without. Default: ``'var'`` for ImageNet models (known by
            their ``fc``) and ``'std'`` for DeepLab and for OpenMMLab's names,
            as in the authors' code.

    Returns:
        Converted: its state carries the dialect in its metadata, where
        :class:`bcn_mm.layers.WSConv2d` looks for it.

    Raises:
        ValueError: names the first entry that is missing, left over, of a
            wrong shape or not finite, or says which argument does not fit.

    Example:
        >>> state = torch.load('rn50_bcn_ws.pth')  # doctest: +SKIP
        >>> from_authors(state).meta['ws_dialect']  # doctest: +SKIP
        'var'
    """
    if dialect not in (None, 'none'):
        check_dialect(dialect)
    check_values(state)
    state = _without_module(state)
    if arch is not None:
        list(layers_of(arch, {}))  # an unknown one is said first
    inner = _inner_of(state)
    arch = arch or arch_of(state)
    if arch:
        check_architecture(state, arch, inner)
    norms, convs = _norms_and_convs(state, arch, inner)
    deeplab = bool(arch) and arch.startswith('deeplabv3')
    if dialect is None:
        if arch and not deeplab and 'fc.weight' not in state:
            raise ValueError(
                "there is neither the classifier of the authors' ImageNet "
                'models nor the head of DeepLab; say the dialect of weight '
                f'standardization: {", ".join(DIALECTS)} or none'
            )
        dialect = 'var' if 'fc.weight' in state else 'std'
    groups = sorted(set(groups_of(state)))
    notes = [f'{len(convs)} convolutions and {len(norms)} norms mapped']
    rates = [name for name in state if name.endswith(f'.{inner}.{RATE}')]
    if rates:
        notes.append(
            f'{rates[0]} and {len(rates) - 1} others left out: the rate of '
            f'the estimates is an argument here'
        )
    own_names = {
        f'{norm}.{theirs.format(inner=inner)}': f'{norm}.{own}'
        for norm in norms
        for own, theirs in AUTHORS.items()
    }
    result = OrderedDict()
    for name, value in state.items():
        if name in own_names and value.dim() == 3:
            value = value.flatten()
        if name not in rates:
            result[own_names.get(name, name)] = value
    for norm in norms:
        passes = torch.zeros((), dtype=torch.long)
        result.setdefault(f'{norm}.num_batches_tracked', passes)
    if deeplab:
        notes += _join_branches(result, dialect)
        result = OrderedDict((_to_mmseg(name), value) for name, value in result.items())
        convs = [_to_mmseg(f'{name}.')[:-1] for name in convs]
    elif 'fc.weight' in result:
        notes.append(
            'fc.weight and fc.bias kept: backbones report them as unexpected keys'
        )
    if len(groups) == 1 and groups != [32]:
        notes.append(f'build the model with num_groups={groups[0]}')
    result._metadata = _metadata_of(convs, dialect)
    meta = dict(
        arch=arch or "in OpenMMLab's names",
        source="the authors' layout",
        ws_dialect=dialect,
        num_groups=groups[0] if len(groups) == 1 else groups,
        bcn_mm_version=__version__,
    )
    return Converted(result, meta, notes)


def _metadata_of(convs: List[str], dialect: str) -> OrderedDict:
    """The metadata by which standardized convolutions know their dialect."""
    metadata = OrderedDict({'': dict(version=1)})
    for name in convs:
        metadata[name] = dict(version=1)
        if dialect != 'none':
            metadata[name][METADATA] = dialect
    return metadata


def _norms_and_convs(
    state: State, arch: Optional[str], inner: str
) -> Tuple[List[str], List[str]]:
    """The names of the norms and of the standardized convolutions."""
    if arch:
        layers = list(layers_of(arch, state))
        return tuple(
            [layer.name for layer in layers if layer.kind == kind]
            for kind in ('norm', 'conv')
        )
    norms, convs = [], []
    end = f'.{inner}.running_mean'
    for name, value in state.items():
        layer, entry = name.rpartition('.')[::2]
        norm = name[: -len(end)]
        if name.endswith(end):
            # else a BatchNorm that its owner calls so
            if getattr(state.get(f'{norm}.weight'), 'ndim', 0) == 3:
                _check_norm(state, f'{norm}.', inner)
                norms.append(norm)
        elif (
            entry == 'weight'
            and value.dim() == 4
            and f'{layer}.bias' not in state  # not the last of a head
        ):
            convs.append(layer)
    return norms, convs


def _to_mmseg(name: str) -> str:
    """An entry of the authors' DeepLab, by its name in mmseg."""
    if not name.startswith('aspp.'):
        return f'backbone.{name}'
    _, layer, rest = name.split('.', 2)
    return f'decode_head.{_HEAD_TO_MMSEG[layer]}.{rest}'


def _from_mmseg(name: str) -> Optional[str]:
    """The reverse; None if their DeepLab has no such layer."""
    if name.startswith('backbone.'):
        return name[len('backbone.') :]
    for mm, theirs in _HEAD_FROM_MMSEG.items():
        start = f'decode_head.{mm}.'
        if name.startswith(start):
            return f'aspp.{theirs}.{name[len(start) :]}'
    return None


def _rotate(weight: Tensor, by: int) -> Tensor:
    """Move the five branches of the joining convolution's input."""
    return weight.unflatten(1, (5, -1)).roll(by, 1).flatten(1, 2)


def _join_branches(state: State, dialect: str) -> List[str]:
    """Make mmseg's joining convolution of the authors', in place."""
    name = 'aspp.conv2.weight'
    weight = _rotate(state[name], 1)  # the image pool first
    state[name] = weight
    if weight.shape[2:] == (3, 3):
        return []
    exact = weight.double()
    if dialect != 'none':
        exact = exact - exact.mean(1, keepdim=True)
    wide = exact.new_zeros(*weight.shape[:2], 3, 3)
    wide[:, :, 1:2, 1:2] = exact
    state[name] = wide.to(weight.dtype)
    if dialect != 'none':
        gain = _divisor(exact, dialect) / _divisor(wide, dialect)
        mean, var = 'aspp.bn2.running_mean', 'aspp.bn2.running_var'
        dtype = state[mean].dtype
        state[mean] = (gain * state[mean].double()).to(dtype)
        # so that gain^2 (var + eps) is the new var + eps
        state[var] = (gain**2 * (state[var].double() + _EPS) - _EPS).to(dtype)
    return [
        "aspp.conv2 (1x1 in the authors' head) became the centre of mmseg's "
        '3x3 bottleneck, aspp.bn2 was scaled to it: equal in evaluation, '
        'trained on it is a 3x3 convolution'
    ]


def _divisor(weight: Tensor, dialect: str) -> Tensor:
    """What weight standardization divides each filter by."""
    unbiased, under_root = DIALECTS[dialect]
    var = weight.flatten(1).var(1, unbiased=unbiased)
    return (var + _EPS).sqrt() if under_root else var.sqrt() + _EPS


def to_authors(state: State, inner: str = 'pbn') -> Converted:
    """Convert a state dict of bcn_mm to the authors' layout.

    :func:`from_authors` makes the same tensors of it again, bit for bit; its
    dialect of weight standardization has no place there and goes into
    ``meta``, and that some convolutions have none into the notes: the
    authors' networks standardize all.

    Args:
        state (dict): Of a backbone, of an mmseg DeepLabV3 (whose names become
            the authors') or of another model (whose names stay).
        inner (str): What the inner norms are called: ``'pbn'`` (ImageNet and
            DeepLab code) or ``'bn'`` (later code). Default: ``'pbn'``.

    Returns:
        Converted: the state dict, and what had no place in it.

    Raises:
        ValueError: names the first entry that cannot be expressed.
    """
    if inner not in INNER:
        raise ValueError(f'inner must be one of {INNER}, but got {inner!r}')
    check_values(state)
    trained = dialects_of(state)
    state = _without_module(state)
    end = '.batch_weight'
    norms = [k[: -len(end)] for k in state if k.endswith(end)]
    if not norms:
        raise ValueError(f'{next(iter(state))}: there is no BCN in this state')
    names = {}
    for norm in norms:
        for own, theirs in AUTHORS.items():
            name = f'{norm}.{own}'
            if name not in state:
                raise ValueError(f'{name} is missing')
            wanted = (0,) if own == 'num_batches_tracked' else (1,)
            if state[name].dim() not in wanted:
                raise ValueError(
                    f'{name} has shape {tuple(state[name].shape)}: the '
                    f"authors' layout has one estimate per channel"
                )
            names[name] = f'{norm}.{theirs.format(inner=inner)}'
    deeplab = 'decode_head.aspp_modules.0.conv.weight' in state
    result, left_out = OrderedDict(), []
    for name, value in state.items():
        if name in names and name.endswith(('.weight', '.bias')):
            value = value.view(1, -1, 1)
        theirs = names.get(name, name)
        if deeplab:
            if name.startswith('auxiliary_head.'):
                left_out.append(name)
                continue
            theirs = _from_mmseg(theirs)
            if theirs is None:
                raise ValueError(f"{name}: the authors' DeepLab has no such layer")
            if theirs == 'aspp.conv2.weight' and value.shape[1:2] == (1280,):
                value = _rotate(value, -1)
        result[theirs] = value
    if deeplab:
        check_architecture(result, arch_of(result), inner)
    notes = [f'{len(norms)} norms mapped']
    if left_out:
        notes.append(
            f'{left_out[0]} and {len(left_out) - 1} others left out: the '
            f"authors' DeepLab has no auxiliary head"
        )
    if deeplab and result['aspp.conv2.weight'].shape[2:] != (1, 1):
        notes.append("aspp.conv2 is 3x3, in the authors' code it is 1x1")
    dialects = set(trained.values())
    if len(dialects) > 1:
        raise ValueError(f'several dialects in one state: {sorted(dialects)}')
    meta = dict(source=f'bcn_mm {__version__}')
    if dialects:
        (meta['ws_dialect'],) = dialects
        notes.append(f'weight standardization: {meta["ws_dialect"]}')
        _, convs = _norms_and_convs(state, None, inner)
        plain = [name for name in convs if name not in trained]
        if plain:
            notes.append(
                f'{plain[0]} and {len(plain) - 1} other convolutions have none; in '
                f"the authors' layout nothing says so"
            )
    return Converted(result, meta, notes)
