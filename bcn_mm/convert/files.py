"""Reading stock configs, and writing thin ones that inherit from them."""

import importlib.util
import os.path as osp
import tempfile
from typing import List

from mmengine.config import Config

from .._files import replacing
from ..errors import InputError
from . import new_style


def file_of(source: str) -> str:
    """The path of a config file, or of one of an installed package.

    Args:
        source (str): A path, or ``'mmdet::...'``, ``'mmseg::...'`` and so on.

    Raises:
        FileNotFoundError: if there is none.
    """
    if '::' not in source:
        if not osp.isfile(source):
            raise FileNotFoundError(f'config {source} does not exist')
        return source
    package, name = source.split('::', 1)
    if importlib.util.find_spec(package) is None:
        raise FileNotFoundError(f'{source}: {package} is not installed')
    try:
        path, _ = Config._get_cfg_path(source, '')
    except FileNotFoundError:
        path = ''
    if not osp.isfile(path):
        raise FileNotFoundError(f'{source}: {package} ships no config {name}')
    return path


def read_config(source: str) -> Config:
    """Read a config file, or one of an installed package.

    Args:
        source (str): As of :func:`file_of`.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = file_of(source)
    if '::' not in source or Config._is_lazy_import(path):
        return Config.fromfile(path)
    # inherited as it will be: mmengine then notes the scope in every part
    return _read_bases([source])


def _read_bases(bases: List[str]) -> Config:
    """What an old-style config inherits that has nothing of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'config.py')
        with open(path, 'w') as file:
            file.write(f'_base_ = {bases!r}\n')
        return Config.fromfile(path)


def _bases_of(path: str) -> List[str]:
    """What a config file says that it inherits from, files by their paths."""
    if Config._is_lazy_import(path):
        return new_style.base_files(path)
    return [
        base if '::' in base else osp.join(osp.dirname(path), base)
        for base in Config._get_base_files(path)
    ]


def chain_of(source: str) -> List[str]:
    """The files that a config is made of, its own first.

    Args:
        source (str): As of :func:`file_of`.

    Returns:
        list[str]: their real paths.
    """
    found: List[str] = []
    rest = [source]
    while rest:
        path = osp.realpath(file_of(rest.pop()))
        if path not in found:
            found.append(path)
            rest += _bases_of(path)
    return found


def _bases_elsewhere(recipe: str) -> List[str]:
    """What a recipe of bcn_mm's inherits from that is none."""
    found = []
    for base in _bases_of(file_of(recipe)):
        own = '::' not in base or base.startswith('bcn_mm::')
        found += _bases_elsewhere(base) if own else [base]
    return found


def check_target(source: str, path: str) -> None:
    """Make sure that a file to write is none that its source is made of.

    Args:
        source (str): As of :func:`file_of`.
        path (str): The file to write.

    Raises:
        InputError: if it is: it would inherit from itself.
    """
    if osp.realpath(path) in chain_of(source):
        raise InputError(
            f'{path} is part of {source}, which would inherit from itself; write '
            f'another file'
        )


def difference(base: dict, new: dict) -> dict:
    """What a config that inherits from ``base`` must say to be ``new``."""
    if set(base) - set(new):
        return dict(_delete_=True, **new)
    found = {}
    for key, value in new.items():
        if key in base and base[key] == value:
            continue
        inner = base.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = difference(inner, value)
        elif isinstance(value, dict) and key in base:
            value = dict(_delete_=True, **value)
        found[key] = value
    return found


def write_config(cfg: Config, source: str, path: str) -> None:
    """Write a config as a thin one that inherits from its source.

    In the style of the source: one that imports its types is inherited from
    by ``read_base()``. From a recipe ``bcn_mm::...``, which stock tools do not
    find, what it inherits from in turn is inherited.

    Args:
        cfg (Config): What the written config shall say.
        source (str): What it was made from, as for :func:`read_config`.
        path (str): The file to write, ``*.py``; it is replaced at once, when
            what it says was read back and found right.

    Raises:
        InputError: if ``path`` is what the source is made of, or a new-style
            config cannot be imported from there.
        RuntimeError: if the written config does not say what it should.
    """
    check_target(source, path)
    folder = osp.dirname(osp.abspath(path))
    if Config._is_lazy_import(file_of(source)):
        stock = new_style.plain(read_config(source))
        changes = difference(stock, new_style.plain(cfg))
        base = new_style.module_of(file_of(source), folder)
        text = new_style.text_of(changes, stock, base)
    else:
        text = _old_style_text(cfg, source, folder)
    with replacing(path, '.part.py') as draft:
        with open(draft, 'w') as file:
            file.write(text)
        if new_style.plain(Config.fromfile(draft)) != new_style.plain(cfg):
            raise RuntimeError(
                f'{path}: cannot be written as a config that inherits from {source}'
            )


def _from(folder: str, source: str) -> str:
    """What a config in a folder calls another one.

    Behind a link '..' may be one folder to mmengine and another one to the system.
    """
    path = osp.relpath(source, folder)
    found = osp.realpath(osp.join(folder, path))
    return path if found == osp.realpath(source) else osp.abspath(source)


def _old_style_text(cfg: Config, source: str, folder: str) -> str:
    if source.startswith('bcn_mm::'):
        bases = _bases_elsewhere(source)
        stock = _read_bases(bases)
    else:
        bases = [source if '::' in source else _from(folder, source)]
        stock = read_config(source)
    text = Config(difference(stock.to_dict(), cfg.to_dict())).pretty_text
    base = bases[0] if len(bases) == 1 else bases
    return f'_base_ = {base!r}\n{text}' if bases else text
