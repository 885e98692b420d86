"""The shipped configs build, and train on real pictures at full scale."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from dump_state import check_dump, dumping
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from bcn_mm import BCN, WSConv2d

CONFIGS = sorted((ROOT / 'configs').glob('*/*.py'))
FULL = {
    'coco': 'configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py',
    'cityscapes': 'configs/deeplabv3/'
    'deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py',
}
FOREIGN = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_builds_as_it_says(path):
    cfg = Config.fromfile(path)
    scope = cfg.default_scope
    init_default_scope(scope)
    module = __import__(f'{scope}.registry', fromlist=['MODELS'])
    model = module.MODELS.build(cfg.model)
    if 'bcn' in path.stem:
        layers = list(model.modules())
        assert sum(isinstance(m, BCN) for m in layers) > 20
        for m in layers:
            assert isinstance(m, BCN) or not isinstance(m, FOREIGN), m
        # every convolution that a norm follows is standardized
        plain = {
            n
            for n, m in model.named_modules()
            if type(m) is nn.Conv2d and m.bias is None
        }
        assert not plain
        assert any(isinstance(m, WSConv2d) for m in layers)
    assert not cfg.model.backbone.get('norm_eval', False)
    assert cfg.train_dataloader.batch_size == 1


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize('data', FULL)
def test_trains_at_its_own_scale(data, real_data, tmp_path, python):
    """A few steps and pictures; BCN_MM_STEPS=20 for that many steps."""
    steps = int(os.environ.get('BCN_MM_STEPS', 3))
    root = f'{real_data / data}/'
    config = ROOT / FULL[data]
    quiet = []
    for loader in ('train', 'val', 'test'):
        quiet += [
            f'{loader}_dataloader.dataset.data_root={root}',
            f'{loader}_dataloader.num_workers=0',
            f'{loader}_dataloader.persistent_workers=False',
        ]
    few = ['val', 'test']
    quiet += [f'{n}_dataloader.dataset.indices=3' for n in few]
    quiet += ['default_hooks.logger.interval=1']
    if data == 'coco':
        annotations = f'{root}annotations/instances_val2017.json'
        quiet += [f'{n}_evaluator.ann_file={annotations}' for n in few] + [
            'train_cfg.max_epochs=1',
            f'train_dataloader.dataset.indices={steps}',
            'train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
            'model.test_cfg.rcnn.score_thr=0',
        ]
        more = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=3',
                'train_dataloader.dataset.indices=1']  # fmt: skip
    else:
        quiet += [
            f'train_cfg.max_iters={steps}',
            f'train_cfg.val_interval={steps}',
            f'default_hooks.checkpoint.interval={steps}',
        ]
        more = [f'train_cfg.max_iters={steps + 1}',
                f'train_cfg.val_interval={steps + 5}',
                f'default_hooks.checkpoint.interval={steps + 5}']  # fmt: skip
    python('tools/train.py', config, '--work-dir', tmp_path, '--cfg-options',
           *quiet, timeout=1100)  # fmt: skip
    rows = scalars(tmp_path)
    losses = [row['loss'] for row in rows if 'loss' in row]
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
    key = dict(coco='coco/bbox_mAP', cityscapes='mIoU')[data]
    (validated,) = (row[key] for row in rows if key in row)
    python('tools/test.py', config, checkpoint, '--work-dir',
           tmp_path / 'test', '--cfg-options', *quiet,
           timeout=1100)  # fmt: skip
    (file,) = (tmp_path / 'test').glob('*/2*.json')
    assert json.loads(file.read_text())[key] == pytest.approx(
        validated, abs=1e-3
    )
    resumed = dumping(config, tmp_path)
    python('tools/train.py', resumed, '--work-dir', tmp_path / 'more',
           '--resume', checkpoint, '--cfg-options', *quiet, *more,
           timeout=1100, PYTHONPATH=str(ROOT / 'tests'))  # fmt: skip
    check_dump(tmp_path, checkpoint, steps)
    print(f'{data}: losses {losses}, {key} {validated}')


def scalars(folder):
    (file,) = Path(folder).glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.open()]
