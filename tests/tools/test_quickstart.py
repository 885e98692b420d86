"""The quickstart and its data set."""

import json
import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT, run
from pycocotools.coco import COCO

SHAPES = 'tools/dataset_converters/make_shapes.py'


@pytest.mark.parametrize('split', ['train', 'val'])
def test_shapes_are_coco(shapes, split):
    coco = COCO(shapes / 'annotations' / f'instances_{split}.json')
    assert len(coco.imgs) == dict(train=12, val=6)[split]
    assert coco.anns
    for annotation in coco.anns.values():
        image = coco.imgs[annotation['image_id']]
        picture = cv2.imread(str(shapes / split / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3)
        mask = coco.annToMask(annotation).astype(bool)
        x, y, w, h = annotation['bbox']
        rows, cols = np.nonzero(mask)
        assert x - 1 <= cols.min() and cols.max() <= x + w + 1
        assert y - 1 <= rows.min() and rows.max() <= y + h + 1
        # a polygon through its border pixels covers them in part
        assert 0.75 * annotation['area'] < mask.sum() <= annotation['area']
        labels = cv2.imread(
            str(shapes / 'labels' / split / f'{image["id"]:06d}.png'),
            cv2.IMREAD_GRAYSCALE,
        )
        inside = labels[mask] == annotation['category_id']
        assert inside.mean() > 0.9


def test_shapes_are_reproducible(tmp_path, python):
    def make(name, *words):
        python(SHAPES, tmp_path / name, '--train', 2, '--val', 1, *words)
        return [f.read_bytes() for f in sorted((tmp_path / name).rglob('*.[jp][pn]g'))]

    assert make('a') == make('b') != make('c', '--seed', 1)
    before = (tmp_path / 'a' / 'shapes.json').stat().st_mtime_ns
    make('a')  # is there already
    assert (tmp_path / 'a' / 'shapes.json').stat().st_mtime_ns == before


def test_shapes_do_not_overwrite(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
    done = run(sys.executable, SHAPES, tmp_path / 'mine')
    assert done.returncode == 1 and 'holds something else' in done.stdout
    assert [f.name for f in (tmp_path / 'mine').iterdir()] == ['thesis.txt']
    assert [f.name for f in tmp_path.iterdir()] == ['mine']


@pytest.mark.parametrize(
    'words, message',
    [
        (['ROOT', '--size', 8], '--size 8: '),
        (['ROOT', '--train', -2], '--train -2'),
        (['FILE'], 'FILE is a file'),
        (['FILE/x'], 'FILE'),
    ],
)
def test_shapes_of_wrong_arguments(words, message, tmp_path):
    (tmp_path / 'FILE').write_text('years of work')
    place, *words = words
    done = run(sys.executable, SHAPES, tmp_path / place, *words)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith('error: ') and message in line
    assert [f.name for f in tmp_path.iterdir()] == ['FILE']


def test_smallest_shapes(tmp_path, python):
    python(SHAPES, tmp_path / 'a', '--train', 40, '--val', 1, '--size', 32)
    coco = COCO(tmp_path / 'a/annotations/instances_train.json')
    assert all(coco.annToMask(a).any() for a in coco.anns.values())


SHORT = {
    'det': [
        'model.test_cfg.rcnn.score_thr=0',  # an untrained model finds things
        'model.test_cfg.rcnn.max_per_img=10',  # which take long to draw
        'train_dataloader.dataset.indices=4',
    ],
    'seg': [
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=4',
        'default_hooks.checkpoint.interval=4',
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_quickstart(task, tmp_path, python):
    """Every command of it on a few pictures, in detection for every norm."""
    compared = ['--compare'] if task == 'det' else []
    out = python(
        'tools/quickstart.py',
        '--quick',
        *compared,
        '--task',
        task,
        '--data',
        tmp_path / 'data',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        *SHORT[task],
        COLUMNS='200',
    )
    rows = ('BCN + WS', 'GN + WS', 'BN') if compared else ('BCN + WS',)
    for words in (*rows, 'predictions.png'):
        assert words in out
    # as it can be typed
    assert f'$ SHAPES_ROOT={tmp_path}/data python tools/test.py' in out
    sheet = cv2.imread(str(tmp_path / 'work' / f'{task}-predictions.png'))
    assert sheet.std() > 10
    metrics = json.loads(
        next((tmp_path / 'work').glob(f'{task}-bcn-ws/test/*/*.json')).read_text()
    )
    assert dict(det='coco/bbox_mAP', seg='mIoU')[task] in metrics


def test_quickstart_reports_a_failure_in_one_line(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'x').touch()
    done = run(
        sys.executable,
        'tools/quickstart.py',
        '--quick',
        '--data',
        tmp_path / 'data',
        '--work-dir',
        tmp_path / 'work',
        cwd=ROOT,
    )
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert 'error: drawing pictures failed' in done.stdout
