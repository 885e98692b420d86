import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    text = (ROOT / 'bcn_mm' / 'version.py').read_text()
    return re.search(r"__version__ = '(.+)'", text).group(1)


def requirements(name: str) -> list:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def shipped(*patterns: str) -> list:
    """Files in bcn_mm/.mim, where mmengine and mim look for what a package
    offers: links to the real folders in the repository, copies in a wheel.
    setuptools expands ** only since 62.3, and mim's set-up installs 60.2."""
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


setup(
    name='bcn-mm',
    version=version(),
    description='Batch-Channel Normalization and Weight Standardization for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
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
    python_requires='>=3.9',
    # torch (2.4 or later; tried: 2.13), mmcv and the other mm packages are the
    # user's own choice of build or fork (requirements/mminstall.txt, or
    # lock-onedl.txt), so none is required here
    install_requires=requirements('runtime'),
    extras_require=dict(
        mm=requirements('mminstall'),
        imagenet=requirements('imagenet'),
        export=requirements('export'),
        study=requirements('study'),
        tests=[
            line for name in ('tests', 'export', 'study') for line in requirements(name)
        ],
    ),
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
