"""Configs as trees: walking through them, and naming their parts."""

from typing import Any, Iterable, Iterator, Optional, Tuple

#: The parts of a model that :func:`bcn_mm.convert.to_bcn` tells apart.
PARTS = ('backbone', 'neck', 'heads', 'other')


def children(node: Any, name: str = '') -> Iterator[Tuple[str, Any, Any]]:
    """What a dict or a list of a config holds.

    Args:
        node (object): A part of a config; what is neither a dict nor a list
            or a tuple holds nothing.
        name (str): Its dotted name. Default: that of the whole.

    Yields:
        tuple: dotted name, key or index, and value.
    """
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return
    for key, value in items:
        yield f'{name}.{key}' if name else str(key), key, value


def walk(node: Any, name: str = '') -> Iterator[Tuple[str, dict]]:
    """All dicts in a part of a config, outer ones first.

    A dict may be changed when it comes: what it holds is looked up later.

    Args:
        node (object): A part of a config.
        name (str): Its dotted name. Default: that of the whole.

    Yields:
        tuple: dotted name and dict.

    Example:
        >>> model = dict(heads=[dict(type='A'), dict(type='B')])
        >>> [name for name, _ in walk(model, 'model')]
        ['model', 'model.heads.0', 'model.heads.1']
    """
    if isinstance(node, dict):
        yield name, node
    for where, _, value in children(node, name):
        yield from walk(value, where)


def innermost(name: str, paths: Iterable[str]) -> Optional[str]:
    """Which of these parts of a config a layer of this name belongs to.

    Example:
        >>> innermost('backbone.stem.0.bn', ['', 'backbone', 'neck'])
        'backbone'
    """
    inside = [p for p in paths if p and f'{name}.'.startswith(f'{p}.')]
    return max(inside, key=len, default=None)


def part_of(path: str) -> str:
    """What ``--only`` calls the part of a model that a setting belongs to.

    Example:
        >>> [part_of(p) for p in ('model.backbone.norm_cfg',
        ...                       'model.roi_head.mask_head')]
        ['backbone', 'heads']
    """
    for word in path.split('.'):
        if word in ('backbone', 'neck'):
            return word
        if word == 'head' or word.endswith(('_head', '_heads')):
            return 'heads'
    return 'other'


def find_detector(node: dict, path: str) -> Tuple[dict, str]:
    """The outermost part of a model's config that has a backbone.

    That is the model itself, or what a semi-supervised or a video model
    wraps.
    """
    if 'backbone' in node:
        return node, path
    for where, _, value in children(node, path):
        if isinstance(value, dict) and 'backbone' in value:
            return value, where
    return node, path
