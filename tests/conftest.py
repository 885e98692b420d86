import contextlib
import enum
import functools
import importlib
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

import bcn_mm  # noqa: F401  lets torch.load read checkpoints
from bcn_mm.ops._compat import TORCH
from bcn_mm.ops.kernels import BACKENDS, using

ROOT = Path(__file__).parents[1]
# what tests share, and the studies
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

# Equal runs try equal examples; raise max_examples to search for new ones.
settings.register_profile(
    'fixed',
    derandomize=True,
    deadline=None,
    # a fixture chooses a backend, and no example changes that
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile('fixed')

# A COCO- and a Cityscapes-shaped folder, as docs/guides/recipes.md describes.
REAL_DATA = Path(os.environ.get('BCN_MM_DATA', ROOT.parent / 'shared' / 'data'))


def needs_torch(major, minor, what):
    """Skip a test of what an older torch cannot do."""
    return pytest.mark.skipif(
        (major, minor) > TORCH, reason=f'needs torch {major}.{minor}: {what}'
    )


EXPORT = needs_torch(2, 6, 'torch.export for sizes that vary')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_scope():
    """No test builds in the scope that another one, or a fixture, left behind."""
    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def real_data():
    if not (REAL_DATA / 'coco').is_dir():
        pytest.skip(
            f'no real pictures: {REAL_DATA}/coco is missing; set BCN_MM_DATA '
            'to a folder with coco/ and cityscapes/'
        )
    return REAL_DATA


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Have one backend after the other make all passes."""
    if not BACKENDS[request.param].serves(torch.empty(1, 1)):
        pytest.skip(f'{request.param} does not serve the CPU')
    with using(request.param):
        yield request.param


@pytest.fixture
def log():
    """The lines that mmengine's logger is given."""
    from support.checkpoints import logged_lines

    with logged_lines() as lines:
        yield lines


def run(*command, timeout=600, cwd=ROOT, **environment):
    """Run a command of the user's; returns it with its output as text."""
    command = [str(word) for word in command]
    # what is imported may begin to use a GPU, which no fork can go on with
    forks = command[0] == sys.executable and not torch.cuda.is_available()
    if forks and command[1].endswith('.py'):
        from support import preloaded

        if not any(name.startswith(preloaded.READ_AT_START) for name in environment):
            environment = {**os.environ, **environment}
            return preloaded.run(command[1:], cwd, environment, timeout)
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope='session')
def python():
    """Run a script with this interpreter and expect it to succeed."""

    def call(*words, code=0, **kwargs):
        done = run(sys.executable, *words, **kwargs)
        assert done.returncode == code, done.stdout[-4000:]
        return done.stdout

    return call


@pytest.fixture(scope='session')
def shapes(tmp_path_factory, python):
    """A few pictures of the quickstart's data set."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    python(
        'tools/dataset_converters/make_shapes.py',
        folder,
        '--train',
        12,
        '--val',
        6,
        '--size',
        96,
    )
    return folder


@contextlib.contextmanager
def torchvision_or_stand_in():
    """mmpretrain imports torchvision for transforms that no recipe uses; with
    a CPU build of torch there may be none that loads."""
    with contextlib.ExitStack() as stack:
        try:
            import torchvision.ops  # noqa: F401
        except (ImportError, RuntimeError):
            fake = types.ModuleType('torchvision')
            fake.__version__ = '0'
            fake.RandomResizedCrop = object
            fake.InterpolationMode = enum.Enum(
                'InterpolationMode',
                'NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS',
            )
            fake.transforms = fake.functional = fake.ops = fake.boxes = fake
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name in (
                'torchvision',
                'torchvision.transforms',
                'torchvision.transforms.functional',
                'torchvision.transforms.transforms',
                'torchvision.ops',
                'torchvision.ops.boxes',
            ):
                patch.setitem(sys.modules, name, fake)
        yield


def import_mmpretrain():
    """Register what mmpretrain has; skips where it is not installed."""
    pytest.importorskip(
        'mmpretrain',
        reason='the ImageNet recipes need mmpretrain: '
        'pip install -r requirements/imagenet.txt',
    )
    with torchvision_or_stand_in():
        for part in ('models', 'datasets', 'evaluation', 'visualization'):
            importlib.import_module(f'mmpretrain.{part}')


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a tool, or -m and a module, in this process; its one line of complaint."""
    logger = MMLogger.get_current_instance()
    level = logger.level

    def call(tool, *words):
        if tool == '-m':
            module, *words = words
            start = functools.partial(runpy.run_module, module)
        else:
            monkeypatch.syspath_prepend(str((ROOT / tool).parent))
            start = functools.partial(runpy.run_path, str(ROOT / tool))
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            start(run_name='__main__')
        assert end.value.code == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    yield call
    logger.setLevel(level)
