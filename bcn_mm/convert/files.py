"""Reading stock configs, and writing thin ones that inherit from them."""

import importlib.util
import os.path as osp
import tempfile

from mmengine.config import Config

from .._files import replacing


def read_config(source: str) -> Config:
    """Read a config file, or one of an installed package.

    Args:
        source (str): A path, or ``'mmdet::...'``, ``'mmseg::...'`` and so on.

    Raises:
        FileNotFoundError: if there is none.
    """
    if '::' not in source:
        if not osp.isfile(source):
            raise FileNotFoundError(f'config {source} does not exist')
        return Config.fromfile(source)
    package, name = source.split('::', 1)
    if importlib.util.find_spec(package) is None:
        raise FileNotFoundError(f'{source}: {package} is not installed')
    # inherited as it will be: mmengine then notes the scope in every part
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'config.py')
        with open(path, 'w') as file:
            file.write(f'_base_ = {source!r}\n')
        try:
            return Config.fromfile(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f'{source}: {package} ships no config {name}'
            ) from None


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

    Args:
        cfg (Config): What the written config shall say.
        source (str): What it was made from, as for :func:`read_config`.
        path (str): The file to write, ``*.py``; it is replaced at once, when
            what it says was read back and found right.

    Raises:
        RuntimeError: if the written config does not say what it should.
    """
    stock = read_config(source)
    folder = osp.dirname(osp.abspath(path))
    base = source if '::' in source else osp.relpath(source, folder)
    text = Config(difference(stock.to_dict(), cfg.to_dict())).pretty_text
    with replacing(path, '.part.py') as draft:
        with open(draft, 'w') as file:
            file.write(f'_base_ = {base!r}\n{text}')
        if Config.fromfile(draft).to_dict() != cfg.to_dict():
            raise RuntimeError(
                f'{path}: cannot be written as a config that inherits from {source}'
            )
