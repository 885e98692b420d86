"""The recipes train on real pictures, each of them at a reduced scale."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from support.recipes import FULL, QUICK, RECIPES, load, norm_of

from bcn_mm.convert.tree import walk
from bcn_mm.engine.launch import build_runner

STEPS = 2
SIZES = {(512, 1024): (32, 64), (769, 769): (49, 49), (513, 513): (49, 49)}


@pytest.fixture(scope='session')
def roots(real_data, tmp_path_factory):
    """Real pictures where each recipe's data root is looked for; the layouts
    that the folder does not have are made of links to its pictures."""
    made = tmp_path_factory.mktemp('roots')

    def link(target, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target.resolve())

    coco, streets = real_data / 'coco', real_data / 'cityscapes'
    for split in ('train', 'val'):
        # COCO's instances as Cityscapes', where only riders have no namesake
        root = made / 'instances'
        link(coco / f'{split}2017', root / 'leftImg8bit' / split)
        source = coco / 'annotations' / f'instances_{split}2017.json'
        renamed = source.read_text().replace('"chair"', '"rider"')
        file = root / f'annotations/instancesonly_filtered_gtFine_{split}.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(renamed)
        # a street's classes as VOC's
        pictures = sorted((streets / 'leftImg8bit' / split).glob('*/*.png'))
        voc, names = made / 'voc', [f'{split}_{p.stem}' for p in pictures]
        for name, picture in zip(names, pictures):
            labels = str(picture).replace('_leftImg8bit', '_gtFine_labelTrainIds')
            labels = Path(labels.replace('leftImg8bit', 'gtFine'))
            link(picture, voc / f'JPEGImages/{name}.jpg')
            for folder in ('SegmentationClass', 'SegmentationClassAug'):
                link(labels, voc / folder / f'{name}.png')
        lists = voc / 'ImageSets/Segmentation'
        lists.mkdir(parents=True, exist_ok=True)
        for part in ('train', 'aug') if split == 'train' else ('val',):
            (lists / f'{part}.txt').write_text('\n'.join(names))
        # one picture of COCO's for each of ImageNet's first classes
        link(coco / f'{split}2017', made / 'imagenet' / split)
        pictures = sorted((coco / f'{split}2017').glob('*.jpg'))
        file = made / f'imagenet/meta/{split}.txt'
        file.parent.mkdir(exist_ok=True)
        lines = [f'{p.name} {n}' for n, p in enumerate(pictures)]
        file.write_text('\n'.join(lines))
    return dict(
        coco=coco,
        cityscapes=streets,
        instances=made / 'instances',
        voc=made / 'voc',
        imagenet=made / 'imagenet',
    )


def reduced(path, roots, work_dir):
    """The recipe with small pictures and few proposals, from scratch.

    Its network is half as wide, and no deeper than a ResNet-50; that of
    test_recipes_build.py is whole.
    """
    cfg = load(path)
    # a single value per channel, as here, is too little for BatchNorm
    alone = 'syncbn' in path.stem
    size = (160, 96) if cfg.default_scope == 'mmdet' else (96, 64)
    batch = 2 if alone else min(4, cfg.train_dataloader.batch_size)
    cfg.train_dataloader.batch_size = batch

    root = {
        'data/coco/': 'coco',
        'data/cityscapes/': 'instances'
        if path.parent.name == 'cityscapes'
        else 'cityscapes',
        'data/VOCdevkit/VOC2012': 'voc',
        'data/imagenet': 'imagenet',
    }
    if path.parent.name == 'cityscapes':
        cfg.val_evaluator = cfg.val_evaluator[0]  # Cityscapes' own needs more
        cfg.train_dataloader.dataset.times = 1
    for _, d in walk(cfg._cfg_dict):
        kind = d.get('type')
        for key, value in d.items():
            for old, new in root.items():
                if isinstance(value, str) and value.startswith(old):
                    d[key] = value.replace(old, f'{roots[new]}/', 1)
        if kind in ('Resize', 'RandomResize') and 'scale' in d:
            d.scale = [size] * 2 if isinstance(d.scale, list) else size
        if 'milestones' in d:
            d.update(milestones=[1], end=2)
        if 'depth' in d:
            d.update(depth=50, base_channels=32, stem_channels=32)
        if 'fc_out_channels' in d:
            d.fc_out_channels = 64
        small = dict(RandomResizedCrop=64, ResizeEdge=72).get(kind)
        if small:
            d.scale = small
        if kind == 'CenterCrop':
            d.crop_size = 64
        if kind == 'RandomSampler':
            d.num = 16
        if 'num_workers' in d:
            d.num_workers = 0
            d.persistent_workers = False
        for key, value in dict(nms_pre=50, max_per_img=8, score_thr=0).items():
            if key in d:
                d[key] = value
        for key in ('crop_size', 'size'):
            if d.get(key) in SIZES:
                d[key] = SIZES[d[key]]
        if d.get('mode') == 'slide':
            d.stride = (33, 33)
        if (d.get('init_cfg') or {}).get('type') == 'Pretrained':
            d.init_cfg = None
        if d.get('pretrained'):
            d.pretrained = None
    for part in ('neck', 'decode_head', 'auxiliary_head', 'head'):
        d = cfg.model.get(part) or {}
        for key in ('in_channels', 'c1_in_channels'):
            if isinstance(d.get(key), list):
                d[key] = [n // 2 for n in d[key]]
            elif key in d:
                d[key] //= 2
    cfg.load_from = None

    if cfg.train_cfg.get('type') == 'IterBasedTrainLoop':
        cfg.train_cfg.update(max_iters=STEPS, val_interval=STEPS)
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
        dataset = cfg.train_dataloader.dataset
        dataset.get('dataset', dataset).indices = STEPS * batch
    cfg.val_dataloader.dataset.indices = 1
    cfg.default_hooks.checkpoint = None
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    cfg.launcher = 'none'
    return cfg


class Record(Hook):
    def __init__(self):
        self.losses, self.metrics = [], {}

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(outputs['loss'].item())

    def after_val_epoch(self, runner, metrics):
        self.metrics = metrics


def train(cfg):
    with pytest.MonkeyPatch.context() as patch:
        # for the log and for memory only, and half of the time
        patch.setattr(Config, 'pretty_text', '')
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        patch.setattr('gc.collect', lambda *_: 0)
        runner, record = build_runner(cfg), Record()
        runner.register_hook(record)
        runner.train()
    return record, dict(runner.model.named_buffers())


@pytest.fixture(scope='module')
def trained(roots, tmp_path_factory):
    """Trains a recipe; of those that are equal when they are reduced, the first."""
    known = {}

    def call(path):
        cfg = reduced(path, roots, Path('out'))
        read = {k: cfg[k] for k in inspect.signature(Runner).parameters if k in cfg}
        key = json.dumps(read, sort_keys=True, default=str)
        if key not in known:
            work_dir = tmp_path_factory.mktemp('recipe')
            cfg.update(work_dir=str(work_dir), experiment_name=work_dir.name)
            known[key] = train(cfg)
        return known[key]

    return call


@pytest.mark.real_data
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else pytest.mark.slow)
        for p in RECIPES
    ],
)
def test_trains(path, trained):
    record, buffers = trained(path)
    assert len(record.losses) == STEPS
    assert all(0 < loss < 1e4 for loss in record.losses), record.losses
    keys = {
        'coco': ['coco/bbox_mAP'],
        'cityscapes': ['mIoU'],
        'voc12aug': ['mIoU'],
        'in1k': ['accuracy/top1'],
    }[path.stem.split('_')[-1].split('-')[0]]
    if path.parent.name == 'cityscapes':
        keys = ['coco/bbox_mAP']
    if 'mask' in path.stem:
        keys.append('coco/segm_mAP')
    for key in keys:
        assert 0 <= record.metrics[key] <= 100, record.metrics

    said, estimates = norm_of(path), 0
    for name, buffer in buffers.items():
        if re.search(r'running_(mean|var)$', name):
            estimates += 1
            start = 0 if name.endswith('mean') else 1
            moved = buffer.reshape(-1, buffer.shape[-1]) != start
            assert torch.isfinite(buffer).all(), name
            assert moved.any(1).all() == (said != 'bn-frozen'), name
    assert (estimates > 0) == (not said.startswith('gn'))


@pytest.mark.real_data
def test_backbone_from_imagenet(roots, tmp_path):
    """A checkpoint of the ImageNet recipe is a detector's backbone."""
    path = ROOT / 'configs/resnet/resnet50-bcn-ws_8xb1_in1k.py'
    cfg = reduced(path, roots, tmp_path)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook')
    train(cfg)
    (checkpoint,) = tmp_path.glob('*.pth')
    want = torch.load(checkpoint)['state_dict']

    cfg = Config.fromfile(ROOT / FULL['coco'])
    cfg.model.backbone.update(
        base_channels=32,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.'
        ),
    )
    init_default_scope('mmdet')
    backbone = importlib.import_module('mmdet.registry').MODELS.build(
        cfg.model.backbone
    )
    backbone.init_weights()
    got = backbone.state_dict()
    assert {f'backbone.{k}' for k in got} == {
        k for k in want if k.startswith('backbone.')
    }
    for name, value in got.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, want[f'backbone.{name}']), name
        else:  # what kind of standardization the weights are for
            assert value == want[f'backbone.{name}'], name
