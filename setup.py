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
    # bcn_mm/.mim is where mmengine and mim look for a package's configs and
    # tools: links to the real folders in the repository, copies in a wheel
    package_data={
        'bcn_mm': [
            '.mim/model-index.yml',
            '.mim/configs/**',
            '.mim/tools/**/*.py',
            '.mim/tools/dist_*.sh',
            '.mim/tools/slurm_*.sh',
        ]
    },
    exclude_package_data={'bcn_mm': ['*.pyc']},
    python_requires='>=3.9',
    # torch (2.4 or later; tried: 2.13), mmcv and the other mm packages are the
    # user's own choice of build or fork (requirements/mminstall.txt, or
    # lock-onedl.txt), so none is required here
    install_requires=requirements('runtime'),
    extras_require=dict(
        mm=requirements('mminstall'),
        imagenet=requirements('imagenet'),
        tests=requirements('tests'),
    ),
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
