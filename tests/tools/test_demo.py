"""tools/demo/, as users run it."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import bcn_mm

TOOL = 'tools/demo/image_demo.py'
DET = 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py'
SEG = 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py'
CONFIGS = {
    'det': ('mask-rcnn_r18_bcn-ws_shapes', DET),
    'seg': ('deeplabv3_r18-d8_bcn-ws_shapes', SEG),
}


@pytest.fixture(scope='module', params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """Random weights, as a bare state dict; (task, config, file)."""
    name, config = CONFIGS[request.param]
    model = bcn_mm.get_model(name)
    path = tmp_path_factory.mktemp(request.param) / 'model.pth'
    torch.save(model.state_dict(), path)
    return request.param, config, path


@pytest.mark.slow
@pytest.mark.real_data
def test_pictures_are_drawn(checkpoint, real_data, tmp_path, python):
    task, config, weights = checkpoint
    folder = 'coco/val2017' if task == 'det' else 'cityscapes/leftImg8bit/val'
    files = sorted((real_data / folder).rglob('*.[jp][pn]g'))[:2]
    (tmp_path / 'in').mkdir()
    for file in files:
        picture = Image.open(file).convert('RGB')
        picture.resize((160, 120)).save(tmp_path / 'in' / file.name)
    (tmp_path / 'in' / 'notes.txt').write_text('no picture')
    out = tmp_path / 'new' / 'out'
    shown = python(
        TOOL,
        tmp_path / 'in',
        config,
        weights,
        '--out-dir',
        out,
        '--score-thr',
        0,
        '--opacity',
        1,
    )
    assert 'Wrote 2 pictures to' in shown and '100%' in shown
    assert 'Traceback' not in shown and 'WARNING' not in shown
    assert {f.name for f in out.iterdir()} == {f.name for f in files}
    for file in files:
        before = np.asarray(Image.open(tmp_path / 'in' / file.name), int)
        after = np.asarray(Image.open(out / file.name), int)
        assert after.shape == before.shape
        assert (abs(after - before) > 20).any()
    if task == 'seg':  # the config's classes, not those of Cityscapes
        drawn = np.asarray(Image.open(out / files[0].name).convert('RGB'))
        palette = {(60, 60, 60), (220, 20, 60), (0, 130, 200), (60, 180, 75)}
        colours = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
        assert colours & palette


GIVEN = ['tests/none.pth', '--out-dir', 'none']
BAD = {
    'no picture': (['none.jpg', DET, *GIVEN], 'no picture or folder none.jpg'),
    'no pictures': (['configs', DET, *GIVEN], 'no pictures .* in configs'),
    'damaged': ([DET, DET, *GIVEN], 'damaged or no picture'),
    'score': (
        ['PICTURE', DET, *GIVEN, '--score-thr', 2],
        r'--score-thr must be in \[0, 1\]',
    ),
    'opacity': (
        ['PICTURE', DET, *GIVEN, '--opacity', -1],
        r'--opacity must be in \[0, 1\]',
    ),
    'device': (['PICTURE', DET, *GIVEN, '--device', 'x'], 'no such device'),
    'folder': (
        ['PICTURE', DET, 'x', '--out-dir', 'README.md'],
        'README.md is a file',
    ),
    'same folder': (['PICTURE', DET, 'x', '--out-dir', '.'], 'another folder'),
    'scope': (
        ['PICTURE', DET, *GIVEN, '--cfg-options', 'default_scope=mmocr'],
        "scope 'mmocr'",
    ),
}


@pytest.mark.parametrize('words, message', BAD.values(), ids=BAD)
def test_bad_input(words, message, refused, tmp_path):
    picture = tmp_path / 'picture.png'
    Image.new('RGB', (32, 32)).save(picture)
    words = [picture if word == 'PICTURE' else word for word in words]
    if '.' in words:
        words[words.index('.')] = tmp_path
    line = refused(TOOL, *words)
    assert line.startswith('error: ') and re.search(message, line), line


def test_damaged_pictures(tmp_path, refused):
    """Where there are no others, that is said before a model is built."""
    for name in ('a.png', 'b.png'):
        (tmp_path / name).write_text('no picture')
    line = refused(TOOL, tmp_path, DET, *GIVEN)
    assert '2 of 2 pictures are damaged or no pictures: a.png, b.png' in line


@pytest.mark.slow
def test_damaged_pictures_among_others(checkpoint, tmp_path):
    """They are passed over, and named at the end."""
    _, config, weights = checkpoint
    (tmp_path / 'in').mkdir()
    for name in ('b.png', 'd.png'):
        Image.new('RGB', (64, 48)).save(tmp_path / 'in' / name)
    data = (tmp_path / 'in/b.png').read_bytes()
    for name in ('a.png', 'c.png'):
        (tmp_path / 'in' / name).write_bytes(data[: len(data) // 2])
    words = [TOOL, tmp_path / 'in', config, weights, '--out-dir', tmp_path / 'out']
    done = run(sys.executable, *words)
    assert done.returncode == 1
    assert 'Wrote 2 pictures to' in done.stdout
    (line,) = re.findall('^error: .*', done.stdout, re.M)
    assert '2 of 4 pictures are damaged or no pictures: a.png, c.png' in line
    assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == ['b.png', 'd.png']
