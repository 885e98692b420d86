"""Old-style configs said again in the new style, which mmdet's wheel lacks."""

import importlib
import inspect
import sys

from mmengine import registry
from mmengine.config import Config

KINDS = [r for r in vars(registry).values() if isinstance(r, registry.Registry)]
START = """from mmengine.config import read_base

with read_base():
    from .base import *
default_scope = None
"""


def class_of(name, scope):
    """The class that is registered under a name, if that is one of a class."""
    bare = name.rpartition('.')[2]
    names = (f'{scope}.{bare}', bare) if bare[0].isupper() else ()
    found = (kind.get(name) for name in names for kind in KINDS)
    return next(filter(inspect.isclass, found), None)


def home(kind):
    """The module that people import a class from."""
    package = kind.__module__.rpartition('.')[0]
    exports = vars(sys.modules.get(package, kind))
    return package if exports.get(kind.__name__) is kind else kind.__module__


def code(value, scope, imports):
    if isinstance(value, dict):
        # where types are classes, no scope is asked for
        items = {k: v for k, v in value.items() if k != '_scope_'}
        kind = items.get('type')
        kind = class_of(kind, scope) if isinstance(kind, str) else None
        if kind:
            del items['type']
        words = [f'{k!r}: {code(v, scope, imports)}' for k, v in items.items()]
        if kind:
            name = f'{kind.__name__}_{len(imports)}'
            imports[name] = f'from {home(kind)} import {kind.__name__} as {name}'
            words.append(f"'type': {name}")
        return '{' + ', '.join(words) + '}'
    if isinstance(value, (list, tuple)):
        left, right = '[]' if isinstance(value, list) else '()'
        return left + ''.join(f'{code(v, scope, imports)}, ' for v in value) + right
    return repr(value)


def write_class_config(source, folder, text=''):
    """Write a config as one of classes that inherits by ``read_base()``.

    Where a type is no class, as of ``nms``, it stays a string.

    Args:
        source (str or Path): An old-style config.
        folder (Path): Where both files go.
        text (str): What the config says beside, as Python.

    Returns:
        Path: of the config.
    """
    cfg = Config.fromfile(source)
    scope = cfg.pop('default_scope')
    cfg.pop('custom_imports', None)
    register_all_modules_of(scope)
    imports = {}
    lines = [f'{k} = {code(v, scope, imports)}' for k, v in cfg.to_dict().items()]
    folder.mkdir(exist_ok=True)
    (folder / 'base.py').write_text('\n'.join([*imports.values(), *lines]))
    path = folder / 'config.py'
    path.write_text(START + text)
    return path


def register_all_modules_of(scope):
    utils = importlib.import_module(f'{scope}.utils')
    utils.register_all_modules(init_default_scope=False)
