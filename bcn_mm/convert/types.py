"""What a config calls its types, and its scope, in every style of config.

An old-style config names types by strings, with a scope before the name or
without; a new-style one (``read_base()``) holds the classes themselves, or
mmengine's lazy stand-ins for them.
"""

from importlib.util import find_spec
from typing import Any, Optional

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject


def type_name(kind: Any) -> str:
    """The bare name of a type, however a config gives it.

    Args:
        kind (str, type, function, LazyObject or None): What stands at
            ``type``; a dict stands for its own.

    Returns:
        str: without scope or module; ``''`` for what is no type.

    Example:
        >>> from torch import nn
        >>> [type_name(k) for k in ('mmdet.MaskRCNN', nn.ReLU, dict(type='BN'), None)]
        ['MaskRCNN', 'ReLU', 'BN', '']
    """
    if isinstance(kind, dict):
        kind = kind.get('type')
    if isinstance(kind, (LazyObject, LazyAttr)):
        kind = str(kind)
    if isinstance(kind, str):
        return kind.rpartition('.')[2]
    return getattr(kind, '__name__', '')


def scope_of(cfg: Config) -> Optional[str]:
    """The scope in which a config's types are looked up.

    ``default_scope``; where that is None, as in new-style configs, the package
    that the model's class is from, or that its string begins with.

    Args:
        cfg (Config): Of any style.

    Returns:
        str or None: ``'mmdet'``, for instance; None if nothing says it.

    Example:
        >>> scope_of(Config(dict(model=dict(type='mmseg.EncoderDecoder'))))
        'mmseg'
    """
    scope = cfg.get('default_scope')
    if scope:
        return str(scope)
    kind = (cfg.get('model') or {}).get('type')
    if isinstance(kind, (LazyObject, LazyAttr)):
        kind = f'{kind.module}.'
    elif not isinstance(kind, str):
        kind = f'{getattr(kind, "__module__", "")}.'
    package = kind.partition('.')[0] if '.' in kind else ''
    return package if package and find_spec(package) else None
