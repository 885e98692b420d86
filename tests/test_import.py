"""What an import loads, and what it says where packages are missing."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import run

import bcn_mm

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocked())
"""
# what mmengine, mmcv and the recipes bring along too
MM = (
    'mmengine',
    'mmcv',
    'mmdet',
    'mmseg',
    'mmpretrain',
    'addict',
    'cv2',
    'matplotlib',
    'pkg_resources',
    'rich',
    'yaml',
)

pytestmark = pytest.mark.slow


def without(packages, code):
    """Run code where these packages are not installed."""
    return run(sys.executable, '-c', BLOCK.format(packages) + code)


def last_line(done):
    assert done.returncode == 1, done.stdout
    return done.stdout.splitlines()[-1]


# -- where everything is installed --------------------------------------------


def test_import_stays_light():
    heavy = (
        'mmdet',
        'mmseg',
        'onnx',
        'onnxruntime',
        'bcn_mm.convert',
        'bcn_mm.deploy',
        'bcn_mm.engine',
    )
    # torch 2.1 imports onnx for its compiler, which mmengine imports
    code = f"""
import sys, mmengine.runner
before = {{*sys.modules}}
import bcn_mm
print({{*{heavy}}} & {{*sys.modules}} - before)
"""
    done = run(sys.executable, '-c', code)
    assert done.stdout == 'set()\n', done.stdout


def imports_of(node):
    """The modules that are imported when this code is, not in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.module
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports_of(child)


def test_it_imports_nothing_of_programs_by_itself():
    """Neither what reads a command line nor what reads and draws pictures."""
    code = """
import sys, bcn_mm
for name, module in sorted(sys.modules.items()):
    if name.partition('.')[0] == 'bcn_mm':
        print(module.__file__)
"""
    files = run(sys.executable, '-c', code).stdout.splitlines()
    assert any(file.endswith('layers/bcn.py') for file in files), files
    for file in files:
        names = imports_of(ast.parse(Path(file).read_text()))
        found = {name.partition('.')[0] for name in names}
        assert not found & {'argparse', 'cv2', 'matplotlib', 'rich'}, file


# -- where torch alone is -----------------------------------------------------


USE = """
import torch
from bcn_mm.ops import batch_channel_norm, standardize_weight

mean, var = torch.zeros(8), torch.ones(8)
x = torch.randn(2, 8, 5, 5, requires_grad=True)
y = batch_channel_norm(x, 4, mean, var, training=True)
weight = standardize_weight(torch.randn(8, 8, 3, 3, requires_grad=True))
torch.nn.functional.conv2d(y, weight).square().sum().backward()
assert x.grad.isfinite().all() and x.grad.any() and mean.any()
import bcn_mm
print(bcn_mm.__version__, *sorted(m for m in sys.modules if m in {}))
"""


def test_ops_need_torch_alone():
    done = without((*MM, 'numpy'), USE.format(MM))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == bcn_mm.__version__


@pytest.mark.parametrize(
    'code, name',
    [
        ('import bcn_mm; bcn_mm.BCN', 'BCN'),
        ('from bcn_mm import BCN', 'BCN'),
        ('import bcn_mm; bcn_mm.list_models()', 'list_models'),
        ('from bcn_mm import SyncEstimatesHook', 'SyncEstimatesHook'),
    ],
)
def test_more_says_what_is_missing(code, name):
    line = last_line(without(MM, code))
    assert line.startswith(f'ImportError: bcn_mm.{name} needs mmengine and ')
    assert 'mmcv, which are not installed; pip install' in line


def test_every_public_name_says_so():
    code = """
import bcn_mm
for name in bcn_mm.__all__:
    try:
        getattr(bcn_mm, name)
    except ImportError as e:
        assert f'bcn_mm.{name} needs mmengine, which is not' in str(e), e
    else:
        assert name == '__version__', name
assert not hasattr(bcn_mm, 'nothing')
"""
    done = without(('mmengine',), code)
    assert done.returncode == 0, done.stdout


def test_without_torch():
    line = last_line(without(('torch',), 'import bcn_mm'))
    assert line.startswith('ImportError: bcn_mm needs torch, which is not')
    assert 'pip install torch' in line
