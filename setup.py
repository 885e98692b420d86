"""What pyproject.toml cannot say: kernels to compile, files shipped beside them."""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup

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


def kernels() -> dict:
    """The kernels for the CPU, for the torch that is here.

    They are compiled where torch, a compiler and Linux are, and left out else:
    without them, or under another torch, bcn_mm runs without them. The library
    chooses its instruction set when it runs, so it fits any machine of this
    architecture. BCN_MM_BUILD=0 leaves it out.
    """
    if os.environ.get('BCN_MM_BUILD') == '0' or sys.platform != 'linux':
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:  # pip's isolated builds have none
        return {}

    class Build(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, use_ninja=False, **kwargs)

        def get_ext_filename(self, fullname):
            *folders, name = fullname.split('.')
            # as bcn_mm/ops/kernels/cpp.py looks for it
            return os.path.join(*folders, f'{name}-torch-{torch.__version__}.so')

        # where nothing compiles, and where this does not

        def build_extensions(self):
            self.attempt(super().build_extensions)

        def build_extension(self, ext):
            self.attempt(super().build_extension, ext)

        def attempt(self, build, *args):
            try:
                build(*args)
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                print(
                    f'bcn_mm: the kernels for the CPU did not compile, and BCN runs '
                    f'without them ({lines[0]})',
                    file=sys.stderr,
                )

    library = Extension(
        'bcn_mm.ops.kernels._cpu',
        ['csrc/operators.cpp'],
        depends=[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob('csrc/*.h'))],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=['c10', 'torch_cpu', 'torch'],
        # OpenMP is to be that of torch, so nothing is linked for it
        extra_compile_args=['-O3', '-ffp-contract=fast', '-fopenmp', '-g0', '-w'],
        language='c++',
        optional=True,
    )
    return dict(ext_modules=[library], cmdclass=dict(build_ext=Build))


extras = dict(
    mm=requirements('mminstall'),
    **{
        name: requirements(name)
        for name in ('imagenet', 'export', 'study', 'study-weights', 'docs')
    },
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
    **kernels(),
)
