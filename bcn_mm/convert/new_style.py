"""Configs in mmengine's new style: Python that imports its bases and its types.

``with read_base(): from .base import *``, and classes where an old-style config
has strings.
"""

import ast
import os.path as osp
from typing import Any, Dict, List, NamedTuple, Union

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject

from ..errors import InputError
from ..hooks import SyncEstimatesHook
from ..layers import BCN, SyncBCN, WithBCN, WSConv1d, WSConv2d, WSConv3d
from .tree import walk

#: What a converted config may name, by the names in the registries.
OURS = {
    kind.__name__: kind
    for kind in (
        BCN,
        SyncBCN,
        WSConv1d,
        WSConv2d,
        WSConv3d,
        WithBCN,
        SyncEstimatesHook,
    )
}
_WIDTH = 79


class Imported(NamedTuple):
    """A class or function of a config, by where it is imported from."""

    module: str
    name: str


def is_new_style(cfg: Config) -> bool:
    """Whether a config holds its model's type as a class."""
    kind = dict.get(cfg.get('model') or {}, 'type')
    return kind is not None and not isinstance(kind, str)


def use_classes(cfg: Config) -> None:
    """Put the classes of bcn_mm in place of their registered names."""
    for part in ('model', 'custom_hooks'):
        for _, node in walk(cfg.get(part)):
            kind = node.get('type')
            if isinstance(kind, str) and kind in OURS:
                node['type'] = OURS[kind]


def plain(value: Any) -> Any:
    """A config as dicts and lists, types by where they are imported from.

    So that one which was read compares equal to one that was made.
    """
    if isinstance(value, Config):
        value = value._to_lazy_dict()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, (LazyObject, LazyAttr)):
        value = Imported(value.module, str(value))
    elif hasattr(value, '__module__') and hasattr(value, '__qualname__'):
        value = Imported(value.__module__, value.__qualname__)
    if isinstance(value, Imported) and value.name in OURS:
        return Imported('bcn_mm', value.name)
    return value


def base_files(path: str) -> List[str]:
    """The files that a new-style config inherits from."""
    with open(path, encoding='utf-8') as file:
        code = ast.parse(file.read())
    found = []
    for module in Config._get_base_modules(code.body):
        name = module.lstrip('.')
        level = len(module) - len(name)
        if level:
            folder = osp.join(osp.dirname(path), *['..'] * (level - 1))
        else:
            package, _, name = name.partition('.')
            folder = osp.dirname(__import__(package).__file__)
        found.append(osp.join(folder, *name.split('.')) + '.py')
    return found


def text_of(changes: Dict[str, Any], stock: Dict[str, Any], base: str) -> str:
    """A new-style config that says these changes.

    Args:
        changes (dict): What differs, as :func:`.files.difference` finds it in
            two :func:`plain` configs.
        stock (dict): The plain config that it inherits from.
        base (str): The module that this is imported from, as in
            ``from base import *``.
    """
    names: Dict[Imported, str] = {}
    statements = []
    for key, value in changes.items():
        before = stock.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            lead, value, tail = f'{key}.merge(', value, ')'
        else:
            lead, tail = f'{key} = ', ''
        statements.append(lead + _code(value, names, len(lead)) + tail)
    imports = _imports(names)
    blocks = [
        ['from mmengine.config import read_base'],
        imports,
        ['with read_base():', f'    from {base} import *'],
        *([s] for s in statements),
    ]
    # it is checked with the names that a star brings, if at all
    text = '\n\n'.join('\n'.join(b) for b in blocks if b)
    return f'# ruff: noqa: F403, F405\n{text}\n'


def _imports(names: Dict[Imported, str]) -> List[str]:
    modules: Dict[str, List[str]] = {}
    for kind, name in sorted(names.items()):
        alias = '' if name == kind.name else f' as {name}'
        modules.setdefault(kind.module, []).append(kind.name + alias)
    lines = []
    for module, words in modules.items():
        line = f'from {module} import {", ".join(words)}'
        if len(line) > _WIDTH:
            inner = ''.join(f'    {word},\n' for word in words)
            line = f'from {module} import (\n{inner})'
        lines.append(line)
    return lines


def module_of(source: str, folder: str) -> str:
    """What ``from ... import *`` in a folder calls a config file.

    Raises:
        InputError: if a name on the way is none of Python's.
    """
    *parts, name = osp.relpath(source, folder).split(osp.sep)
    up = parts.count('..')
    words = [*parts[up:], osp.splitext(name)[0]]
    for word in words:
        if not word.isidentifier():
            raise InputError(
                f'a new-style config in {folder} cannot inherit from {source}: '
                f'{word!r} cannot be imported; rename it, with _ for - and .'
            )
    return '.' * (up + 1) + '.'.join(words)


def _code(value: Any, names: Dict[Imported, str], column: int) -> str:
    """Python code of a plain value, broken where it is too wide."""
    if isinstance(value, Imported):
        return _name(value, names)
    items: Union[List[str], None] = None
    if isinstance(value, dict):
        words = all(isinstance(k, str) and k.isidentifier() for k in value)
        left, right = ('dict(', ')') if words else ('{', '}')
        lead = '{}=' if words else '{!r}: '
        items = [lead.format(k) + _code(v, names, 4) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        left, right = '[]' if isinstance(value, list) else '()'
        items = [_code(v, names, 4) for v in value]
    if items is None:
        return repr(value)
    comma = ',' if isinstance(value, tuple) and len(items) == 1 else ''
    line = left + ', '.join(items) + comma + right
    if column + len(line) <= _WIDTH and '\n' not in line:
        return line
    inner = ''.join(f'{item},\n' for item in items)
    inner = ''.join(f'    {row}\n' for row in inner.splitlines())
    return f'{left}\n{inner}{right}'


def _name(kind: Imported, names: Dict[Imported, str]) -> str:
    """What a config calls what it imports: by its name, if that is free."""
    if kind not in names:
        name, number = kind.name, 1
        while name in names.values():
            number += 1
            name = f'{kind.name}_{number}'
        names[kind] = name
    return names[kind]
