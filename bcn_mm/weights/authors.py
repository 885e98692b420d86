"""Checkpoints of other layouts, whole: key maps and conversions.

Single norms are read by :mod:`bcn_mm.weights.layouts` whenever a state dict is
loaded; here is what needs to see a whole checkpoint. The authors' layout is
that of https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization.
"""

import re
from collections import OrderedDict
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmengine.runner import checkpoint as reading
from torch import Tensor, nn

from ..layers import BCN
from ..layers.ws_conv import METADATA
from ..ops import DIALECTS, check_dialect
from ..version import __version__
from .layouts import (
    AUTHORS,
    INNER,
    RATE,
    State,
)

_EPS = 1e-5  # of their norms and of their weight standardization
_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
#: Architectures in the authors' layout, as ``--arch`` names them.
ARCHS = (
    'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152',
    'resnext50_32x4d', 'resnext101_32x4d', 'resnext152_32x4d',
    'deeplabv3_resnet50', 'deeplabv3_resnet101', 'deeplabv3_resnet152',
)  # fmt: skip

# The authors' head -> mmseg's ASPPHead
_HEAD = {
    **{f'aspp{i}': f'aspp_modules.{i - 1}.conv' for i in range(1, 5)},
    **{f'aspp{i}_bn': f'aspp_modules.{i - 1}.bn' for i in range(1, 5)},
    'aspp5': 'image_pool.1.conv',
    'aspp5_bn': 'image_pool.1.bn',
    'conv2': 'bottleneck.conv',
    'bn2': 'bottleneck.bn',
    'conv3': 'conv_seg',
}
_HEAD_BACK = {mm: theirs for theirs, mm in _HEAD.items()}


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


# -- architectures ------------------------------------------------------------


class _Entry(NamedTuple):
    """One layer: its name, and the weight's shape, or C of a norm."""

    name: str
    kind: str  # 'conv', 'norm', 'plain' (with bias, not standardized)
    shape: Tuple[int, ...]


def _backbone(depth: int, groups: int, base_width: int) -> Iterator[_Entry]:
    yield _Entry('conv1', 'conv', (64, 3, 7, 7))
    yield _Entry('bn1', 'norm', (64,))
    basic, before = depth < 50, 64
    for stage, blocks in enumerate(_BLOCKS[depth]):
        planes = 64 * 2**stage
        width = planes * base_width // 64 * groups
        out = planes if basic else 4 * planes
        for block in range(blocks):
            name = f'layer{stage + 1}.{block}'
            if basic:
                shapes = [(out, before, 3, 3), (out, out, 3, 3)]
            else:
                shapes = [
                    (width, before, 1, 1),
                    (width, width // groups, 3, 3),
                    (out, width, 1, 1),
                ]
            for i, shape in enumerate(shapes, 1):
                yield _Entry(f'{name}.conv{i}', 'conv', shape)
                yield _Entry(f'{name}.bn{i}', 'norm', shape[:1])
            if block == 0 and (stage or out != before):
                shape = (out, before, 1, 1)
                yield _Entry(f'{name}.downsample.0', 'conv', shape)
                yield _Entry(f'{name}.downsample.1', 'norm', shape[:1])
            before = out


def _entries(arch: str, state: State) -> Iterator[_Entry]:
    """The layers of an architecture; where it leaves a choice, as in state."""
    found = re.fullmatch(
        r'(deeplabv3_)?(?:resnet(\d+)|resnext(\d+)_(\d+)x(\d+)d)', arch
    )
    depth = int(found[2] or found[3]) if found else 0
    if depth not in _BLOCKS or (found[3] and depth < 50):
        raise ValueError(
            f'unknown architecture {arch!r}; choose one of {", ".join(ARCHS)}'
        )
    yield from _backbone(depth, int(found[4] or 1), int(found[5] or 64))
    features = 512 if depth < 50 else 2048
    if not found[1]:
        if 'fc.weight' in state:
            shape = (_classes(state, 'fc.weight'), features)
            yield _Entry('fc', 'plain', shape)
        return
    for i in range(1, 6):
        kernel = (1, 1) if i in (1, 5) else (3, 3)
        yield _Entry(f'aspp.aspp{i}', 'conv', (256, features, *kernel))
        yield _Entry(f'aspp.aspp{i}_bn', 'norm', (256,))
    # 1x1; 3x3 where to_authors took it from mmseg
    last = state.get('aspp.conv2.weight')
    kernel = (
        (3, 3) if last is not None and last.shape[2:] == (3, 3) else (1, 1)
    )
    yield _Entry('aspp.conv2', 'conv', (256, 1280, *kernel))
    yield _Entry('aspp.bn2', 'norm', (256,))
    shape = (_classes(state, 'aspp.conv3.weight'), 256, 1, 1)
    yield _Entry('aspp.conv3', 'plain', shape)


def _classes(state: State, name: str) -> int:
    weight = state.get(name)
    return 1 if weight is None or not weight.dim() else len(weight)


def arch_of(state: State) -> Optional[str]:
    """The architecture of a checkpoint in torchvision's names.

    Args:
        state (dict): Name -> tensor.

    Returns:
        str, optional: As in :data:`ARCHS`, other widths of ResNeXt included;
        None for a model in OpenMMLab's names (``backbone.*``).

    Raises:
        ValueError: if the names or the number of blocks are of none.
    """
    if 'conv1.0.weight' in state:
        raise ValueError(
            "conv1.0.weight: the stem of the authors' `beta` models, three "
            'convolutions without norms, is not in mmseg'
        )
    if 'conv1.weight' not in state and any(
        name.startswith('backbone.') for name in state
    ):
        return None
    blocks = [set(), set(), set(), set()]
    for name in state:
        found = re.match(r'layer([1-4])\.(\d+)\.', name)
        if found:
            blocks[int(found[1]) - 1].add(found[2])
    counts = tuple(map(len, blocks))
    bottleneck = any('.conv3.' in k and k[0] == 'l' for k in state)
    depths = [
        depth
        for depth, want in _BLOCKS.items()
        if want == counts and (depth >= 50) == bottleneck
    ]
    if not depths:
        first = next(iter(state), None)
        raise ValueError(
            f'{first}: blocks per stage are {", ".join(map(str, counts))}, '
            f'which no ResNet or ResNeXt has; --arch says what is missing'
        )
    name = f'resnet{depths[0]}'
    weight = state.get('layer1.0.conv2.weight')
    if bottleneck and weight is not None and weight.dim() == 4:
        width, each = weight.shape[:2]
        if each and width != each:
            name = f'resnext{depths[0]}_{width // each}x{each}d'
    head = any(name.startswith('aspp.') for name in state)
    return f'deeplabv3_{name}' if head else name


# -- checks -------------------------------------------------------------------


def check_finite(name: str, value: object) -> None:
    """Make sure that an entry of a state dict, if a tensor, is finite.

    Raises:
        ValueError: names the entry and says what it holds.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.isnan().any():
            raise ValueError(f'{name} holds NaN')
        if value.isinf().any():
            raise ValueError(f'{name} holds infinity')


def check_values(state: State) -> None:
    """Make sure that a state dict holds finite numbers under names.

    Raises:
        ValueError: names the first entry that does not.
    """
    if not state:
        raise ValueError('the state dict is empty')
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{name!r} is no name of a tensor')
        if not isinstance(value, Tensor):
            raise ValueError(f'{name} is no tensor but {type(value).__name__}')
        check_finite(name, value)
        if not value.is_floating_point() and not name.endswith(
            'num_batches_tracked'
        ):
            raise ValueError(f'{name} holds {value.dtype}, not real numbers')
        if name.endswith('running_var') and (value < 0).any():
            raise ValueError(f'{name} holds a negative variance')


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
                f"{name}: this is BatchNorm's layout, which a BCN model loads "
                f'as it is'
            )
    for name in state:
        if re.search(r'(bn|gn)\d*\.weight$', name):
            if state[name].dim() == 3:
                raise ValueError(
                    f'{name.replace("weight", "pbn.running_mean")} is missing'
                )
            raise ValueError(
                f"{name}: this is GroupNorm's layout, which a BCN model loads "
                f'as it is'
            )
    raise ValueError(
        f"{next(iter(state))}: there are no norms of the authors'"
    )


def _check_architecture(state: State, arch: str, inner: str) -> None:
    """Compare names and shapes; the error names the first that is off."""
    wanted: Dict[str, Tuple[int, ...]] = OrderedDict()
    optional = set()
    groups = (_groups(state) or [32])[0]
    for entry in _entries(arch, state):
        if entry.kind == 'norm':
            for own, theirs in AUTHORS.items():
                name = f'{entry.name}.{theirs.format(inner=inner)}'
                wanted[name] = entry.shape
                if own in ('weight', 'bias'):
                    wanted[name] = (1, groups, 1)
                elif own == 'num_batches_tracked':
                    wanted[name] = ()
                    optional.add(name)
            optional.add(f'{entry.name}.{inner}.{RATE}')
        else:
            wanted[f'{entry.name}.weight'] = entry.shape
            if entry.kind == 'plain':
                wanted[f'{entry.name}.bias'] = entry.shape[:1]
    unknown = [k for k in state if k not in wanted and k not in optional]
    also = f'; not of {arch}: {unknown[0]}' if unknown else ''
    for name, shape in wanted.items():
        if name not in state:
            if name not in optional:
                raise ValueError(f'{name} of {arch} is missing{also}')
        elif tuple(state[name].shape) != shape:
            raise ValueError(
                f'{name} has shape {tuple(state[name].shape)}, in {arch} it '
                f'is {shape}'
            )
    if unknown:
        raise ValueError(f'{unknown[0]} is not of {arch}')


def _groups(state: State) -> List[int]:
    """The numbers of groups of the norms in the authors' layout."""
    found = []
    for inner in INNER:
        for mean, value in state.items():
            if not mean.endswith(f'.{inner}.running_mean'):
                continue
            name = mean[: -len(f'{inner}.running_mean')] + 'weight'
            shape = tuple(state[name].shape) if name in state else ()
            if len(shape) != 3:
                continue
            groups = shape[1]
            if shape != (1, groups, 1) or groups < 1:
                raise ValueError(
                    f'{name} has shape {shape} where (1, groups, 1) belongs'
                )
            if value.numel() % groups:
                raise ValueError(
                    f'{name}: {groups} groups do not divide '
                    f'{value.numel()} channels'
                )
            found.append(groups)
    return found


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


# -- the authors' layout ------------------------------------------------------


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
        arch (str, optional): One of :data:`ARCHS`, which the names and shapes
            must then fit. Default: found out.
        dialect (str, optional): Of weight standardization, ``'none'`` for
            models without. Default: ``'var'`` for ImageNet models (known by
            their ``fc``) and ``'std'`` for DeepLab and for OpenMMLab's names,
            as in the authors' code.

    Returns:
        Converted: its state carries the dialect in its metadata, where
        :class:`bcn_mm.WSConv2d` looks for it.

    Raises:
        ValueError: names the first entry that is missing, left over, of a
            wrong shape or not finite, or says which argument does not fit.

    Example:
        >>> made = from_authors(torch.load('rn50_bcn_ws.pth'))
        >>> made.meta['arch'], made.meta['ws_dialect']
        ('resnet50', 'var')
    """
    if dialect not in (None, 'none'):
        check_dialect(dialect)
    check_values(state)
    state = _without_module(state)
    if arch is not None:
        list(_entries(arch, {}))  # an unknown one is said first
    inner = _inner_of(state)
    arch = arch or arch_of(state)
    if arch:
        _check_architecture(state, arch, inner)
    norms, convs = _layers_of(state, arch, inner)
    deeplab = bool(arch) and arch.startswith('deeplabv3')
    if dialect is None:
        if arch and not deeplab and 'fc.weight' not in state:
            raise ValueError(
                "there is neither the classifier of the authors' ImageNet "
                'models nor the head of DeepLab; say the dialect of weight '
                f'standardization: {", ".join(DIALECTS)} or none'
            )
        dialect = 'var' if 'fc.weight' in state else 'std'
    groups = sorted(set(_groups(state)))
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
        result = OrderedDict(
            (_to_mmseg(name), value) for name, value in result.items()
        )
        convs = [_to_mmseg(f'{name}.')[:-1] for name in convs]
    elif 'fc.weight' in result:
        notes.append('fc.weight and fc.bias kept: backbones report them as '
                     'unexpected keys')  # fmt: skip
    if len(groups) == 1 and groups != [32]:
        notes.append(f'build the model with num_groups={groups[0]}')
    metadata = OrderedDict({'': dict(version=1)})
    for name in convs:
        metadata[name] = dict(version=1)
        if dialect != 'none':
            metadata[name][METADATA] = dialect
    result._metadata = metadata
    meta = dict(
        arch=arch or "in OpenMMLab's names",
        source="the authors' layout",
        ws_dialect=dialect,
        num_groups=groups[0] if len(groups) == 1 else groups,
        bcn_mm_version=__version__,
    )
    return Converted(result, meta, notes)


def _layers_of(
    state: State, arch: Optional[str], inner: str
) -> Tuple[List[str], List[str]]:
    """The names of the norms and of the standardized convolutions."""
    if arch:
        entries = list(_entries(arch, state))
        return tuple(
            [entry.name for entry in entries if entry.kind == kind]
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
    return f'decode_head.{_HEAD[layer]}.{rest}'


def _from_mmseg(name: str) -> Optional[str]:
    """The reverse; None if their DeepLab has no such layer."""
    if name.startswith('backbone.'):
        return name[len('backbone.') :]
    for mm, theirs in _HEAD_BACK.items():
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

    :func:`from_authors` makes the same state of it again, bit for bit; its
    dialect of weight standardization has no place there and goes into
    ``meta``.

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
    metadata = getattr(state, '_metadata', None) or {}
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
    result, left = OrderedDict(), []
    for name, value in state.items():
        if name in names and name.endswith(('.weight', '.bias')):
            value = value.view(1, -1, 1)
        theirs = names.get(name, name)
        if deeplab:
            if name.startswith('auxiliary_head.'):
                left.append(name)
                continue
            theirs = _from_mmseg(theirs)
            if theirs is None:
                raise ValueError(
                    f"{name}: the authors' DeepLab has no such layer"
                )
            if theirs == 'aspp.conv2.weight' and value.shape[1:2] == (1280,):
                value = _rotate(value, -1)
        result[theirs] = value
    if deeplab:
        _check_architecture(result, arch_of(result), inner)
    notes = [f'{len(norms)} norms mapped']
    if left:
        notes.append(f'{left[0]} and {len(left) - 1} others left out: the '
                     f"authors' DeepLab has no auxiliary head")  # fmt: skip
    if deeplab and result['aspp.conv2.weight'].shape[2:] != (1, 1):
        notes.append("aspp.conv2 is 3x3, in the authors' code it is 1x1")
    dialects = {
        entry[METADATA]
        for entry in metadata.values()
        if isinstance(entry, dict) and METADATA in entry
    }
    if len(dialects) > 1:
        raise ValueError(f'several dialects in one state: {sorted(dialects)}')
    meta = dict(source=f'bcn_mm {__version__}')
    if dialects:
        (meta['ws_dialect'],) = dialects
        notes.append(f'weight standardization: {meta["ws_dialect"]}')
    return Converted(result, meta, notes)


# -- loading ------------------------------------------------------------------


def fit(model: nn.Module, state: State) -> State:
    """What has to be seen of a whole state before a model loads it.

    Norms called ``gn1``, as in mmdet's GroupNorm models, are renamed to the
    ``bn1`` of a BCN in their place.

    Args:
        model (nn.Module): That will load it.
        state (dict): Is left as it is.

    Returns:
        dict: ``state``, or a renamed copy.

    Raises:
        RuntimeError: if the state was trained with weight standardization in
            a dialect that the model's convolutions do not have; names the
            first.
    """
    metadata = getattr(state, '_metadata', None) or {}
    renamed = {}
    for name, module in model.named_modules():
        if isinstance(module, BCN):
            alias = re.sub(r'(^|\.)bn(\d*)$', r'\1gn\2', name)
            if alias != name and f'{name}.weight' not in state:
                for entry in ('weight', 'bias'):
                    if f'{alias}.{entry}' in state:
                        renamed[f'{alias}.{entry}'] = f'{name}.{entry}'
        elif isinstance(module, nn.modules.conv._ConvNd):
            trained = (metadata.get(name) or {}).get(METADATA)
            # mmcv's ConvWS has no attribute that says so
            kind = type(module).__name__
            own = 'std' if kind == 'ConvWS2d' else None
            own = getattr(module, 'dialect', own)
            has = repr(own) if own else 'none'
            if trained not in (None, own):
                raise RuntimeError(
                    f'{name}: the checkpoint was trained with weight '
                    f'standardization dialect={trained!r}, this layer is a '
                    f'{kind} with {has}; set conv_cfg=dict('
                    f"type='WSConv2d', dialect={trained!r})"
                )
    if not renamed:
        return state
    result = OrderedDict((renamed.get(k, k), v) for k, v in state.items())
    result._metadata = metadata
    return result


def _load_part(prefix: str, filename: str, map_location=None) -> State:
    """mmengine's loader of ``init_cfg`` with ``prefix``, keeping metadata."""
    checkpoint = reading._load_checkpoint(filename, map_location=map_location)
    state = checkpoint.get('state_dict', checkpoint)
    metadata = getattr(state, '_metadata', None) or {}
    prefix = prefix if prefix.endswith('.') else f'{prefix}.'
    part = OrderedDict(
        (k[len(prefix) :], v) for k, v in state.items() if k.startswith(prefix)
    )
    if not part:
        raise ValueError(f'{prefix} is not in the checkpoint {filename}')
    part._metadata = OrderedDict(
        (k[len(prefix) :], v)
        for k, v in metadata.items()
        if k.startswith(prefix)
    )
    return part


_stock_load = reading.load_state_dict


def _load_fitted(module, state_dict, strict=False, logger=None):
    return _stock_load(module, fit(module, state_dict), strict, logger)


def extend_mmengine() -> None:
    """Let mmengine's loading of checkpoints go through :func:`fit`.

    And keep a state's metadata, which holds the dialect, where ``init_cfg``
    takes a part of it by ``prefix``.
    """
    reading.load_state_dict = _load_fitted
    reading._load_checkpoint_with_prefix = _load_part
