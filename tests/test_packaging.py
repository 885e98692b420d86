"""What an installed bcn_mm offers away from the repository, and its set-up."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.slow

# one config from each stack, and one that defines its own pipeline
DERIVED = [
    'deeplabv3/deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py',
    'mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py',
    'quickstart/mask-rcnn_r18_bcn-ws_shapes.py',
]
USE = """
import sys
import bcn_mm
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import HOOKS, MODELS, DefaultScope

folder = bcn_mm.__path__[0]
print(folder)
for name in sys.argv[1:]:
    with open('derived.py', 'w') as file:
        file.write(f"_base_ = 'bcn_mm::{name}'\\nanswer = 42\\n")
    cfg = Config.fromfile('derived.py')
    assert cfg.answer == 42
    own = get_config(f'bcn_mm::{name}')
    assert own.filename == f'{folder}/.mim/configs/{name}', own.filename
    assert own.model == Config.fromfile(own.filename).model == cfg.model
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        MODELS.build(cfg.model)
        Compose(cfg.test_dataloader.dataset.pipeline)
        for hook in cfg.custom_hooks:
            HOOKS.build(hook)
"""


def tracked(*folders):
    """What git knows in these folders of the repository."""
    names = subprocess.run(
        ['git', 'ls-files', '-z', *folders],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split('\0')
    return [n for n in names if n and os.path.lexists(ROOT / n)]


def copy_of_repository(folder):
    """What git tracks, so that nothing here gets dirty."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, python):
    copy = copy_of_repository(tmp_path_factory.mktemp('copy'))
    python(
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-build-isolation',
        '--wheel-dir',
        copy / 'out',
        copy,
    )
    return next((copy / 'out').glob('bcn_mm-*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory, python):
    folder = tmp_path_factory.mktemp('installed')
    python('-m', 'pip', 'install', '--no-deps', '--target', folder, wheel)
    return folder


def test_wheel_holds_configs_and_tools(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        held = {
            name.split('.mim/')[1]: file.read(name)
            for name in names
            if name.startswith('bcn_mm/.mim/')
        }
    tools = [
        name
        for name in tracked('tools')
        if name.endswith('.py') or name.startswith(('tools/dist_', 'tools/slurm_'))
    ]
    assert sorted(held) == sorted([*tracked('configs'), *tools, 'model-index.yml'])
    for name, data in held.items():
        assert data == (ROOT / name).read_bytes(), name
    # the package, the links to what it offers, and what pip knows of it
    assert {n.split('/')[0].split('-')[0] for n in names} == {'bcn_mm'}


@pytest.fixture
def use(tmp_path, python):
    """Use bcn_mm's configs with this PYTHONPATH, from elsewhere."""
    (tmp_path / 'use.py').write_text(USE)

    def call(path):
        return python('use.py', *DERIVED, cwd=tmp_path, PYTHONPATH=path)

    return call


def test_wheel(installed, use, python, tmp_path):
    assert f'{installed}/bcn_mm\n' in use(str(installed))
    for name in ('train', 'test'):
        script = installed / 'bcn_mm' / '.mim' / 'tools' / f'{name}.py'
        out = python(script, '--help', cwd=tmp_path, PYTHONPATH=str(installed))
        assert 'usage:' in out


def test_checkout(use):
    assert f'{ROOT}/bcn_mm\n' in use(str(ROOT))


def test_editable_install(use, tmp_path):
    where = 'import importlib.util as u; print(u.find_spec("bcn_mm").origin)'
    done = run(sys.executable, '-c', where, cwd=tmp_path, PYTHONPATH='')
    if f'{ROOT}/bcn_mm/' not in done.stdout:
        pytest.skip('bcn_mm is not installed here from this folder (pip -e)')
    assert f'{ROOT}/bcn_mm\n' in use('')


def test_language_is_that_of_the_oldest_python(python, tmp_path):
    """Of what users install and run; vermin reads it, nothing runs."""
    [oldest] = re.findall(
        r'requires-python = ">=(\S+)"', (ROOT / 'pyproject.toml').read_text()
    )
    folders = ['bcn_mm', 'tools', 'configs', 'setup.py']
    vermin = 'from vermin import main; main()'
    python('-c', vermin, '--no-tips', '--violations', f'-t={oldest}-', *folders)
    (tmp_path / 'newer.py').write_text('import tomllib\n')
    done = run(sys.executable, '-c', vermin, f'-t={oldest}-', tmp_path)
    assert done.returncode != 0, 'vermin does not see what is newer'


def test_installing_changes_no_other_package(tmp_path, python):
    """``pip install -e .`` of README, into an environment that has the rest."""
    python('-m', 'venv', '--system-site-packages', tmp_path / 'env')
    # the site-packages of this environment, which may itself be a venv
    [site] = (tmp_path / 'env').glob('lib/python*/site-packages')
    (site / 'rest.pth').write_text(sysconfig.get_path('purelib'))
    copy_of_repository(tmp_path / 'copy')

    def pip(*words):
        python = tmp_path / 'env' / 'bin' / 'python'
        # its kernels have been compiled for the wheel
        done = run(python, '-m', 'pip', *words, BCN_MM_BUILD='0')
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    def frozen():
        lines = pip('list', '--format=freeze')  # names editable packages, too
        return [x for x in lines if '==' in x and not x.startswith('bcn')]

    before = frozen()
    assert any('mmengine==' in line for line in before)  # or the fork's
    out = pip('install', '--no-build-isolation', '-e', tmp_path / 'copy')
    assert any(line.startswith('Successfully installed bcn-mm-') for line in out)
    assert frozen() == before
