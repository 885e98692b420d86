"""What pyproject.toml cannot say: the files that are shipped beside the package."""

import re
from pathlib import Path

from setuptools import __version__, find_packages, setup

ROOT = Path(__file__).parent

if int(__version__.split('.')[0]) < 64:
    raise SystemExit(
        f'bcn_mm needs setuptools 64 or later to be built, but this is {__version__}: '
        f"pip install 'setuptools>=64,<81', or leave out --no-build-isolation"
    )


def version() -> str:
    text = (ROOT / 'bcn_mm' / 'version.py').read_text()
    return re.search(r"__version__ = '(.+)'", text).group(1)


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def shipped(*patterns: str) -> list:
    """Files in bcn_mm/.mim, where mmengine and mim look for what a package
    offers: links to the real folders in the repository, copies in a wheel."""
    package = ROOT / 'bcn_mm'
    if not (package / '.mim' / 'configs').is_dir():
        raise SystemExit(
            'bcn_mm/.mim/configs is no link to configs/: this copy of the '
            'repository lost its symbolic links. Make one with git clone.'
        )
    return [
        path.relative_to(package).as_posix()
        for pattern in patterns
        for path in sorted((package / '.mim').glob(pattern))
        if path.is_file()
    ]


extras = dict(
    mm=requirements('mminstall'),
    **{name: requirements(name) for name in ('imagenet', 'export', 'study', 'docs')},
)
extras['tests'] = sum(
    (requirements(name) for name in ('tests', 'export', 'study', 'docs')), []
)

setup(
    version=version(),
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['bcn_mm', 'bcn_mm.*']),
    package_data=dict(
        bcn_mm=shipped(
            'model-index.yml',
            'configs/**/*',
            'tools/**/*.py',
            'tools/dist_*.sh',
            'tools/slurm_*.sh',
        )
    ),
    # torch (2.0 or later), mmcv and the other mm packages are the user's own
    # choice of build or fork (docs/installation.md), so none is required here
    install_requires=requirements('runtime'),
    extras_require=extras,
)
