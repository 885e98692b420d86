"""One recipe of each task at its own scale, with the programs that users start."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.registry import init_default_scope
from support import authors
from support.recipes import FULL

import bcn_mm


@pytest.mark.slow
@pytest.mark.real_data
def test_starts_from_the_authors_model(real_data, tmp_path, python):
    """Converted as docs/guides/weights.md says, it is in the backbone, bit by bit."""
    net = authors.randomize(authors.Backbone(50, classes=10))
    torch.save(dict(state_dict=net.state_dict()), tmp_path / 'theirs.pth')
    start = 'checkpoints/rn50_bcn_ws_mm.pth'
    python(
        ROOT / 'tools/model_converters/authors_to_mm.py',
        'theirs.pth',
        start,
        cwd=tmp_path,
    )
    want = torch.load(tmp_path / start)['state_dict']

    coco = real_data / 'coco'
    python(
        ROOT / 'tools/train.py',
        ROOT / FULL['coco'],
        '--work-dir',
        'out',
        '--cfg-options',
        f'train_dataloader.dataset.data_root={coco}/',
        f'val_dataloader.dataset.data_root={coco}/',
        f'val_evaluator.ann_file={coco}/annotations/instances_val2017.json',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'train_dataloader.dataset.indices=1',
        'train_dataloader.dataset.pipeline.2.scale=(160,96)',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
        'val_dataloader.dataset.indices=1',
        'val_dataloader.dataset.pipeline.1.scale=(160,96)',
        'train_cfg.max_epochs=1',
        'model.backbone.frozen_stages=4',  # so that the step leaves it alone
        cwd=tmp_path,
    )
    (checkpoint,) = (tmp_path / 'out').glob('*.pth')
    got = torch.load(checkpoint)['state_dict']
    own = {k[9:]: v for k, v in got.items() if k.startswith('backbone.')}
    assert {k for k in want if k not in own} == {'fc.weight', 'fc.bias'}
    for name, value in own.items():
        assert torch.equal(value, want[name]), name
    assert torch.equal(own['conv1.weight'], net.conv1.weight)

    backbone = bcn_mm.get_config(Path(FULL['coco']).stem).model.backbone
    backbone.conv_cfg.dialect = 'std'
    backbone.init_cfg.checkpoint = str(tmp_path / start)
    init_default_scope('mmdet')
    backbone = importlib.import_module('mmdet.registry').MODELS.build(backbone)
    with pytest.raises(RuntimeError, match="trained with .* dialect='var'"):
        backbone.init_weights()


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize('data', FULL)
def test_trains_at_its_own_scale(data, real_data, tmp_path, python):
    """A few steps, then a picture, of a quarter of the size where that is Cityscapes'.

    BCN_MM_STEPS=20 for that many steps.
    """
    steps = int(os.environ.get('BCN_MM_STEPS', 2))
    root = f'{real_data / data}/'
    config = ROOT / FULL[data]
    quiet = [
        'default_hooks.logger.interval=1',
        'model.backbone.init_cfg=None',
        f'train_cfg.val_begin={steps + 2}',  # never
        'test_dataloader.dataset.indices=1',
    ]
    for loader in ('train', 'val', 'test'):
        quiet += [
            f'{loader}_dataloader.dataset.data_root={root}',
            f'{loader}_dataloader.num_workers=0',
            f'{loader}_dataloader.persistent_workers=False',
        ]
    if data == 'coco':
        annotations = f'{root}annotations/instances_val2017.json'
        quiet += [f'{n}_evaluator.ann_file={annotations}' for n in ('val', 'test')] + [
            'train_cfg.max_epochs=1',
            f'train_dataloader.dataset.indices={steps}',
            'train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
            'model.test_cfg.rcnn.score_thr=0',
        ]
    else:
        quiet += [
            f'train_cfg.max_iters={steps}',
            f'default_hooks.checkpoint.interval={steps}',
            'test_dataloader.dataset.pipeline.1.scale=(512,256)',
        ]
    words = ('--cfg-options', *quiet)
    python('tools/train.py', config, '--work-dir', tmp_path, *words, timeout=1100)
    (file,) = tmp_path.glob('*/vis_data/scalars.json')
    losses = [row['loss'] for row in map(json.loads, file.open()) if 'loss' in row]
    assert len(losses) == steps
    assert all(x == x and x < 1e3 for x in losses)
    half = max(1, steps // 2)
    # flat or falling, up to the noise of one picture a step
    assert sum(losses[-half:]) < 1.5 * sum(losses[:half]), losses
    (checkpoint,) = tmp_path.glob('*.pth')
    state = torch.load(checkpoint)['state_dict']
    for name, value in state.items():
        if name.endswith('running_mean'):
            assert value.abs().max() > 0, name
            assert torch.isfinite(value).all(), name
    words = ('--work-dir', tmp_path / 'test', *words)
    python('tools/test.py', config, checkpoint, *words, timeout=1100)
    (file,) = (tmp_path / 'test').glob('*/2*.json')
    key, most = dict(coco=('coco/bbox_mAP', 1), cityscapes=('mIoU', 100))[data]
    metric = json.loads(file.read_text())[key]
    assert 0 <= metric <= most
    print(f'{data}: losses {losses}, {key} {metric}')
