"""A few pictures for the tasks of the study, in the layouts that they have, and the
study in this process."""

import json
import runpy
import sys

import cv2
import numpy as np
import pytest
from conftest import run

# Of Cityscapes: road, building, sky, car.
CLASSES = (0, 2, 10, 13)


@pytest.fixture(scope='session')
def street(tmp_path_factory):
    """Scenes of four of Cityscapes' classes, a colour each: 7 and 3."""
    root = tmp_path_factory.mktemp('data') / 'cityscapes'
    random = np.random.default_rng(0)
    for split, count in (('train', 7), ('val', 3)):
        folders = [root / part / split / 'town' for part in ('leftImg8bit', 'gtFine')]
        for folder in folders:
            folder.mkdir(parents=True)
        for index in range(count):
            labels = random.choice(CLASSES, (3, 4)).astype(np.uint8)
            labels = np.kron(labels, np.ones((24, 24), np.uint8))
            labels[0, :9] = 255
            picture = np.stack([labels * 15, 255 - labels * 15, labels * 9], 2)
            noise = random.integers(0, 20, picture.shape, dtype=np.uint8)
            name = f'town_{index:06d}_000019'
            for folder, end, image in (
                (folders[0], 'leftImg8bit', picture // 2 + noise),
                (folders[1], 'gtFine_labelTrainIds', labels),
            ):
                cv2.imwrite(str(folder / f'{name}_{end}.png'), image)
    return root


@pytest.fixture(scope='session')
def photos(tmp_path_factory, shapes):
    """Four pictures of shapes in COCO's layout, with its categories."""
    root = tmp_path_factory.mktemp('data') / 'coco'
    (root / 'annotations').mkdir(parents=True)
    (root / 'train2017').symlink_to(shapes / 'train')
    path = shapes / 'annotations' / 'instances_train.json'
    content = json.loads(path.read_text())
    content['images'] = content['images'][:4]
    kept = {image['id'] for image in content['images']}
    content['annotations'] = [
        a for a in content['annotations'] if a['image_id'] in kept
    ]
    names = ['person', 'bicycle', 'car']
    for category, name in zip(content['categories'], names):
        category['name'] = name
    content['categories'] += [
        dict(id=100 + k, name=name) for k, name in enumerate(_others(names))
    ]
    target = root / 'annotations' / 'instances_train2017.json'
    target.write_text(json.dumps(content))
    return root


def _others(names):
    from mmdet.datasets import CocoDataset

    return [n for n in CocoDataset.METAINFO['classes'] if n not in names]


@pytest.fixture
def data(shapes, street, photos, monkeypatch):
    """Where the tasks find their pictures, which are made smaller still."""
    from studies.micro_batch.tasks import photos as photos_module
    from studies.micro_batch.tasks import street as street_module

    monkeypatch.setenv('SHAPES_ROOT', str(shapes))
    monkeypatch.setenv('STREET_ROOT', str(street))
    monkeypatch.setenv('PHOTOS_ROOT', str(photos))
    monkeypatch.setattr(street_module, 'SCALE', (96, 72))
    monkeypatch.setattr(street_module.Street, 'crop', (64, 48))
    monkeypatch.setattr(street_module, 'DRAWN', 2)
    monkeypatch.setattr(photos_module, 'SCALE', (96, 96))


@pytest.fixture
def forked(monkeypatch):
    """Trainings in forks of a process that has the packages already."""
    from studies.micro_batch import children

    def start(config, folder, log):
        done = run(sys.executable, 'studies/micro_batch/child.py', config, folder)
        log.write(done.stdout)
        log.flush()
        return done.returncode

    monkeypatch.setattr(children, '_run', start)


@pytest.fixture
def one_by_one(monkeypatch, capsys):
    """The study without processes of its own; what it says."""
    from studies.micro_batch import plan, training
    from studies.micro_batch.records import known

    def perform(runs, folder, workers, console):
        return [known(run, folder) or training._work(run, folder) for run in runs]

    monkeypatch.setattr(plan, 'perform', perform)
    monkeypatch.setenv('COLUMNS', '200')

    def study(*words, code=None):
        monkeypatch.setattr(sys, 'argv', ['study', *map(str, words)])
        try:
            runpy.run_module('studies.micro_batch', run_name='__main__')
        except SystemExit as end:
            assert code and code in str(end.code)
        else:
            assert not code
        return capsys.readouterr().out

    return study
