"""The authors' networks: which there are, their layers' names and shapes."""

import re
from collections import OrderedDict
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from .norm_layouts import AUTHORS, INNER, RATE, State

#: Depth of a ResNet -> blocks in each of its stages.
_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
#: Architectures in the authors' layout, as ``--arch`` names them.
ARCHS = (
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnext50_32x4d',
    'resnext101_32x4d',
    'resnext152_32x4d',
    'deeplabv3_resnet50',
    'deeplabv3_resnet101',
    'deeplabv3_resnet152',
)


class Layer(NamedTuple):
    """One layer of an architecture.

    Attributes:
        name (str): Its prefix in the state dict, without the dot.
        kind (str): ``'conv'``, ``'norm'`` or ``'plain'``: a layer with bias
            whose weight is not standardized.
        shape (tuple[int]): Of the weight; of a norm (C,).
    """

    name: str
    kind: str
    shape: Tuple[int, ...]


def _backbone(depth: int, groups: int, base_width: int) -> Iterator[Layer]:
    yield Layer('conv1', 'conv', (64, 3, 7, 7))
    yield Layer('bn1', 'norm', (64,))
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
                yield Layer(f'{name}.conv{i}', 'conv', shape)
                yield Layer(f'{name}.bn{i}', 'norm', shape[:1])
            if block == 0 and (stage or out != before):
                shape = (out, before, 1, 1)
                yield Layer(f'{name}.downsample.0', 'conv', shape)
                yield Layer(f'{name}.downsample.1', 'norm', shape[:1])
            before = out


def layers_of(arch: str, state: State) -> Iterator[Layer]:
    """The layers of an architecture; where it leaves a choice, as in state.

    Args:
        arch (str): One of :data:`ARCHS`, or another width of ResNeXt.
        state (dict): Name -> tensor; may be empty.

    Yields:
        Layer: in the order of a pass.

    Raises:
        ValueError: if there is no such architecture; names those there are.
    """
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
            yield Layer('fc', 'plain', shape)
        return
    for i in range(1, 6):
        kernel = (1, 1) if i in (1, 5) else (3, 3)
        yield Layer(f'aspp.aspp{i}', 'conv', (256, features, *kernel))
        yield Layer(f'aspp.aspp{i}_bn', 'norm', (256,))
    # 1x1; 3x3 where to_authors took it from mmseg
    last = state.get('aspp.conv2.weight')
    kernel = (3, 3) if last is not None and last.shape[2:] == (3, 3) else (1, 1)
    yield Layer('aspp.conv2', 'conv', (256, 1280, *kernel))
    yield Layer('aspp.bn2', 'norm', (256,))
    shape = (_classes(state, 'aspp.conv3.weight'), 256, 1, 1)
    yield Layer('aspp.conv3', 'plain', shape)


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
        width, per_group = weight.shape[:2]
        if per_group and width != per_group:
            groups = width // per_group
            name = f'resnext{depths[0]}_{groups}x{per_group}d'
    head = any(name.startswith('aspp.') for name in state)
    return f'deeplabv3_{name}' if head else name


def groups_of(state: State) -> List[int]:
    """The numbers of groups of the norms in the authors' layout.

    Args:
        state (dict): Name -> tensor.

    Returns:
        list[int]: one for each norm.

    Raises:
        ValueError: names the first norm that has no such number.
    """
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
                    f'{name}: {groups} groups do not divide {value.numel()} channels'
                )
            found.append(groups)
    return found


def check_architecture(state: State, arch: str, inner: str) -> None:
    """Make sure that a state has the names and shapes of an architecture.

    Args:
        state (dict): Name -> tensor.
        arch (str): As :func:`layers_of` takes it.
        inner (str): What the inner norms are called, one of
            :data:`.norm_layouts.INNER`.

    Raises:
        ValueError: names the first entry that is missing, left over or of
            another shape.
    """
    wanted: Dict[str, Tuple[int, ...]] = OrderedDict()
    optional = set()
    groups = (groups_of(state) or [32])[0]
    for layer in layers_of(arch, state):
        if layer.kind == 'norm':
            for own, theirs in AUTHORS.items():
                name = f'{layer.name}.{theirs.format(inner=inner)}'
                wanted[name] = layer.shape
                if own in ('weight', 'bias'):
                    wanted[name] = (1, groups, 1)
                elif own == 'num_batches_tracked':
                    wanted[name] = ()
                    optional.add(name)
            optional.add(f'{layer.name}.{inner}.{RATE}')
        else:
            wanted[f'{layer.name}.weight'] = layer.shape
            if layer.kind == 'plain':
                wanted[f'{layer.name}.bias'] = layer.shape[:1]
    unknown = [k for k in state if k not in wanted and k not in optional]
    also = f'; not of {arch}: {unknown[0]}' if unknown else ''
    for name, shape in wanted.items():
        if name not in state:
            if name not in optional:
                raise ValueError(f'{name} of {arch} is missing{also}')
        elif tuple(state[name].shape) != shape:
            raise ValueError(
                f'{name} has shape {tuple(state[name].shape)}, in {arch} it is {shape}'
            )
    if unknown:
        raise ValueError(f'{unknown[0]} is not of {arch}')
