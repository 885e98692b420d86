"""The configs that installed packages ship."""

import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, List

from mmengine.config import Config

from bcn_mm.errors import InputError

#: By the names they are imported by, which are also the scopes of their configs.
PACKAGES = (
    'mmdet',
    'mmseg',
    'mmpretrain',
    'mmpose',
    'mmdet3d',
    'mmaction',
    'mmrotate',
    'mmyolo',
)


def home_of(package: str) -> Path:
    """The folder that an installed package ships its configs in."""
    return Path(find_spec(package).origin).parent / '.mim'


def configs(packages: Iterable[str], patterns: Iterable[str]) -> List[str]:
    """The configs of installed packages, as ``package::path``.

    Raises:
        InputError: if a package is not installed.
    """
    found = []
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f'{package} is not installed')
        folder = home_of(package) / 'configs'
        for path in sorted(folder.rglob('*.py')):
            name = path.relative_to(folder)
            if name.parts[0] not in ('_base_', 'common'):
                found.append(f'{package}::{name.as_posix()}')
    return [n for n in found if any(fnmatch.fnmatch(n, p) for p in patterns)]


def package_of(name: str) -> str:
    """The package that ships a config, e.g. ``mmdet``."""
    return name.split('::')[0]


def folder_of(name: str) -> str:
    """The method's folder, e.g. ``mmdet::fcos``."""
    return name.split('/')[0]


def path_of(name: str) -> str:
    """The file of a config."""
    package, path = name.split('::')
    return str(home_of(package) / 'configs' / path)


def read(name: str) -> Config:
    """A config, with what the runner adds to its model."""
    cfg = Config.fromfile(path_of(name))
    if 'data_preprocessor' in cfg and 'model' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg
