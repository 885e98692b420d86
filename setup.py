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


setup(
    name='bcn-mm',
    version=version(),
    description='Batch-Channel Normalization and Weight Standardization '
    'for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['bcn_mm', 'bcn_mm.*']),
    python_requires='>=3.9',
    # torch, mmcv and the other mm packages are the user's own choice of build
    # or fork (requirements/mminstall.txt), so none is required here
    install_requires=requirements('runtime'),
    extras_require=dict(
        mm=requirements('mminstall'), tests=requirements('tests')
    ),
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
