"""Wrong configs and checkpoints end every tool in one line, and write nothing."""

import os
import re
import sys

import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from support.checkpoints import Evil

import bcn_mm

DET = 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py'
SEG = 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py'
TOOLS = {
    'train': ['tools/train.py', 'CONFIG', '--resume', 'WEIGHTS', '--work-dir', 'OUT'],
    'test': ['tools/test.py', 'CONFIG', 'WEIGHTS', '--work-dir', 'OUT'],
    'demo': [
        'tools/demo/image_demo.py',
        'PICTURE',
        'CONFIG',
        'WEIGHTS',
        '--out-dir',
        'OUT',
    ],
    'export': [
        'tools/deployment/export_onnx.py',
        'CONFIG',
        'WEIGHTS',
        '--out',
        'OUT/model.onnx',
        '--images',
        'PICTURE',
    ],
}


CONVERTER = [
    'tools/misc/bcn_config.py',
    'CONFIG',
    '--pretrained',
    'WEIGHTS',
    '-o',
    'OUT/bcn.py',
]


@pytest.fixture(params=TOOLS)
def words(request, tmp_path):
    """A command line of a tool; what it is about is put in its place."""
    return filled(request.param, tmp_path)


@pytest.fixture(params=[*TOOLS, 'convert'])
def words_of_all(request, tmp_path):
    """The same, of the converter too."""
    return filled(request.param, tmp_path)


def filled(tool, tmp_path):
    if tool == 'export':
        pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
        pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    Image.new('RGB', (32, 32)).save(tmp_path / 'picture.png')

    def fill(config, weights):
        given = dict(CONFIG=config, WEIGHTS=weights, PICTURE=tmp_path / 'picture.png')
        return [
            given.get(word) or word.replace('OUT', str(tmp_path / 'out'))
            for word in TOOLS.get(tool, CONVERTER)
        ]

    return fill


def tree(folder):
    return {p: p.is_dir() or p.read_bytes() for p in folder.rglob('*')}


CONFIGS = {
    'missing': (None, r' does not exist'),
    'empty': ('# nothing\n', r' is empty'),
    'folder': ('', r' is a folder'),
    'raising': ('1 / 0', r' cannot be read: ZeroDivisionError: division by zero'),
    'exiting': ('raise SystemExit', r' cannot be read: SystemExit'),
    'unparsable': ('model = dict(', r' cannot be read: SyntaxError'),
    'of another kind': ('model = dict()', r''),
    'missing base': ("_base_ = 'gone.py'", r' cannot be read: .*gone\.py'),
    'missing import': (
        'from mmdet.models.nowhere import Foo\nmodel = dict(type=Foo)',
        r'.* mmdet\.models\.nowhere',
    ),
    'wrong scope': (
        "default_scope = 'nowhere'\nmodel = dict(type='MaskRCNN')",
        r" is of scope 'nowhere'",
    ),
}
NAMES = {'of another kind': 'config.txt'}


@pytest.mark.parametrize('kind', CONFIGS)
def test_configs(kind, words_of_all, refused, tmp_path):
    text, message = CONFIGS[kind]
    config = tmp_path / NAMES.get(kind, 'config.py')
    if kind == 'folder':
        config.mkdir()
    elif text is not None:
        config.write_text(text)
    before = tree(tmp_path)
    line = refused(*words_of_all(config, tmp_path / 'gone.pth'))
    assert re.match(rf'error: config {re.escape(str(config))}{message}', line), line
    assert tree(tmp_path) == before


def test_names_of_packages(words_of_all, refused, tmp_path):
    """Good ones get as far as the checkpoint."""
    gone = tmp_path / 'gone.pth'
    for name, message in (
        ('mmdet::gone/gone.py', 'mmdet ships no config gone/gone.py'),
        ('gone::gone.py', 'gone is not installed'),
    ):
        assert f'config {name}: {message}' in refused(*words_of_all(name, gone))
    line = refused(*words_of_all(f'bcn_mm::{DET.partition("/")[2]}', gone))
    assert f'checkpoint {gone} does not exist' in line


@pytest.fixture(scope='module')
def weights():
    return bcn_mm.get_model('mask-rcnn_r18_bcn-ws_shapes').state_dict()


def write_truncated(path, weights):
    torch.save(weights, path)
    os.truncate(path, path.stat().st_size // 2)


def write_nan(path, weights):
    name = 'backbone.layer1.0.bn1.bias'
    value = torch.full_like(weights[name], torch.nan)
    torch.save(dict(state_dict={**weights, name: value}), path)


def write_code(path, weights):
    harm = Evil(os.mkdir, str(path.with_name('harm')))
    torch.save(dict(state_dict=weights, extra=harm), path)


CHECKPOINTS = {
    'missing': (lambda path, _: None, 'does not exist'),
    'folder': (lambda path, _: path.mkdir(), 'is a folder'),
    'text': (lambda path, _: path.write_text('no'), 'is (damaged|truncated)'),
    'truncated': (write_truncated, 'is (damaged|truncated)'),
    'code': (write_code, 'is damaged or holds more than weights.*was not loaded'),
    'nan': (write_nan, r'backbone\.layer1\.0\.bn1\.bias holds NaN'),
    'list': (lambda path, _: torch.save([1], path), 'holds no state dict but a list'),
    'list inside': (
        lambda path, _: torch.save(dict(state_dict=[1]), path),
        'its state_dict is a list',
    ),
    'no names': (lambda path, _: torch.save({1: 2}, path), '1 is no name'),
}


@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_checkpoints(kind, words_of_all, weights, refused, tmp_path):
    write, message = CHECKPOINTS[kind]
    # whatever they are called
    path = tmp_path / f'given{dict(text=".txt", list=".ckpt").get(kind, ".pth")}'
    write(path, weights)
    before = tree(tmp_path)
    line = refused(*words_of_all(DET, path))
    assert re.match(f'error: checkpoint {re.escape(str(path))}:? {message}', line)
    assert tree(tmp_path) == before


def refused_late(command, shapes, tmp_path):
    """The one line of a tool that has built its model by then, and writes nothing."""
    said = tmp_path / 'said'
    said.touch()
    before = tree(tmp_path)
    apart = [sys.executable, ROOT / 'tests/support/stderr_apart.py', said]
    done = run(*apart, *command, SHAPES_ROOT=str(shapes))
    assert done.returncode == 1, done.stdout[-3000:]
    assert tree(tmp_path) == {**before, said: said.read_bytes()}
    (line,) = said.read_text().splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['.pth', '.ckpt'])
def test_checkpoints_of_another_model(suffix, words, weights, shapes, tmp_path):
    path = tmp_path / f'given{suffix}'
    checkpoint = dict(state_dict=weights, message_hub={}, meta=dict(epoch=1, iter=1))
    torch.save(checkpoint, path)
    assert re.match(
        rf'error: checkpoint {re.escape(str(path))} is of another architecture: '
        r"\d+ of the model's \d+ tensors match, out of \d+",
        refused_late(words(SEG, path), shapes, tmp_path),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'options, message',
    [
        ([], 'SGD needs momentum'),
        (
            ['--cfg-options', 'optim_wrapper.paramwise_cfg.norm_decay_mult=0'],
            r'1 param groups are in the file, not \d+',
        ),
    ],
)
def test_checkpoints_of_another_optimizer(options, message, weights, shapes, tmp_path):
    path = tmp_path / 'given.pth'
    params = bcn_mm.get_model('mask-rcnn_r18_bcn-ws_shapes').parameters()
    torch.save(
        dict(
            state_dict=weights,
            message_hub={},
            meta=dict(epoch=1, iter=1),
            optimizer=torch.optim.AdamW(params).state_dict(),
        ),
        path,
    )
    words = filled('train', tmp_path)(DET, path)
    line = refused_late([*words, *options], shapes, tmp_path)
    assert re.match(
        rf'error: checkpoint {re.escape(str(path))} cannot be resumed with the '
        rf'optimizer of the config: {message}.* \(--cfg-options load_from=',
        line,
    )


def test_weights_that_cannot_be_resumed(weights, refused, tmp_path):
    torch.save(weights, tmp_path / 'given.pth')
    line = refused('tools/train.py', DET, '--resume', tmp_path / 'given.pth')
    assert 'given.pth does not say where its training was' in line
    assert f'--cfg-options load_from={tmp_path / "given.pth"}' in line


@pytest.mark.parametrize(
    'given, message',
    [
        ('nonsense', "'nonsense' must be KEY=VALUE"),
        ('=1', "'=1' must be KEY=VALUE"),
        ('a=[1,2', 'a=[1,2: '),
    ],
)
def test_options(given, message, words, refused):
    line = refused(*words(DET, 'gone.pth'), '--cfg-options', given)
    assert line.startswith('error: --cfg-options') and message in line


@pytest.mark.parametrize(
    'config, key',
    [
        (DET, 'model.pretrained'),
        (SEG, 'model.pretrained'),
        (DET, 'model.backbone.pretrained'),
    ],
)
def test_missing_starts(config, key, refused, tmp_path):
    gone = tmp_path / 'gone.pth'
    words = ['--work-dir', tmp_path / 'w', '--cfg-options', f'{key}={gone}']
    line = refused('tools/train.py', config, *words)
    assert line.startswith(f'error: {key}: checkpoint {gone} does not exist')
    assert f'--cfg-options {key}=None' in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'config, option, kind, message',
    [
        (DET, '--out', 'folder', 'is a folder'),
        (DET, '--out', 'below a file', 'is a file, not a folder'),
        (SEG, '--out', 'folder', 'is a folder'),
        (SEG, '--out', 'file', 'is a file, not a folder'),
        (DET, '--show-dir', 'file', 'is a file, not a folder'),
        (SEG, '--show-dir', 'below a file', 'is a file, not a folder'),
        (DET, '--work-dir', 'file', 'is a file, not a folder'),
    ],
)
def test_outputs(config, option, kind, message, refused, tmp_path):
    """Said before even the checkpoint is asked for."""
    suffix = '.pkl' if option == '--out' and kind != 'file' else ''
    path = tmp_path / f'given{suffix}'
    if kind == 'folder':
        path.mkdir()
    else:
        path.touch()
    target = path / 'new.pkl' if kind == 'below a file' else path
    line = refused('tools/test.py', config, 'gone.pth', option, target)
    assert line.startswith(f'error: {option} {target}') and message in line


@pytest.mark.parametrize('given', ['x', '0', '--amp', ''])
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_numbers_of_processes(tool, given):
    words = [DET, *(['gone.pth'] if tool == 'test' else []), given]
    done = run('bash', ROOT / f'tools/dist_{tool}.sh', *words)
    assert done.returncode == 1
    assert done.stdout == f'error: PROCESSES must be a number, but got {given}\n'
