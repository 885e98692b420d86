"""The shipped configs say what their names say, and train on real pictures.

Each of them at a reduced scale; at full scale, one of each task.
"""

import importlib
import json
import os
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, import_mmpretrain
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from support import authors
from support.dump_state import check_dump, dumping
from torch import nn

import bcn_mm
from bcn_mm import BCN, WSConv2d
from bcn_mm.engine.launch import build_runner

CONFIGS = sorted((ROOT / 'configs').glob('*/*.py'))
RECIPES = [p for p in CONFIGS if p.parent.name != 'quickstart']
FULL = {
    'coco': 'configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py',
    'cityscapes': 'configs/deeplabv3/'
    'deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024.py',
}
# Their training is among the quick tests, one of each family.
QUICK = {
    'mask-rcnn_r50_fpn_bcn-ws-all_2x_coco',
    'faster-rcnn_x50-32x4d_fpn_bcn-all_1x_coco',
    'cascade-mask-rcnn_r50_fpn_bcn-ws-all_1x_coco',
    'retinanet_r50_fpn_bcn-ws-all_1x_coco',
    'fcos_r50_fpn_bcn-ws-all_1x_coco',
    'mask-rcnn_r50_fpn_bcn-ws-all_1x_cityscapes',
    'deeplabv3_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024',
    'deeplabv3_r101-d16_bcn-ws_8xb2-33k_voc12aug-513x513',
    'deeplabv3plus_r50-d8_bcn-ws_8xb1-80k_cityscapes-769x769',
    'pspnet_r50-d8_bcn-ws_8xb1-80k_cityscapes-512x1024',
    'resnet50-bcn-ws_8xb1_in1k',
}
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
# what a name says -> its norm, and the convolution before it
NORMS = {
    'bcn-ws': (BCN, WSConv2d),
    'bcn': (BCN, nn.Conv2d),
    'bn-frozen': (nn.BatchNorm2d, nn.Conv2d),
    'bn': (nn.BatchNorm2d, nn.Conv2d),
    'syncbn': (nn.SyncBatchNorm, nn.Conv2d),
    'gn-ws': (nn.GroupNorm, ConvWS2d),
    'gn': (nn.GroupNorm, nn.Conv2d),
}


def norm_of(path):
    names = '|'.join(sorted(NORMS, key=len, reverse=True))
    return re.search(f'[-_]({names})(-all)?_', path.stem).group(1)


def load(path):
    """The config; skips where the package that it is for is not installed."""
    if path.parent.name == 'resnet':
        import_mmpretrain()
    return Config.fromfile(path)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_builds_as_it_says(path):
    cfg = load(path)
    init_default_scope(cfg.default_scope)
    module = importlib.import_module(f'{cfg.default_scope}.registry')
    # mmpretrain's backbones read values while they are built
    with torch.device('cpu' if path.parent.name == 'resnet' else 'meta'):
        model = module.MODELS.build(cfg.model)
    said = norm_of(path)
    norm, conv = NORMS[said]
    if path.parent.name == 'quickstart':
        batch = 1
    else:
        batch = int(re.search(r'8xb(\d+)', path.stem + '8xb1').group(1))
        assert cfg.auto_scale_lr.base_batch_size == 8 * batch
    assert cfg.train_dataloader.batch_size == batch

    norms = dict(norms_of(model))
    heads = [n for n, m in norms.items() if not n.startswith('backbone.')]
    if said == 'bn-frozen':  # heads have none or GroupNorm
        assert all(type(norms.pop(n)) is nn.GroupNorm for n in heads)
    elif said == 'bn' and path.parent.name == 'quickstart':
        norms = {n: m for n, m in norms.items() if n not in heads}
    assert len(norms) >= 20
    for name, m in norms.items():
        assert isinstance(m, norm), name
        assert isinstance(m, BCN) == (norm is BCN), name
        assert m.affine, name
    if '-all_' in path.stem:
        parts = {n.rsplit('.', 1)[0] for n in norms}
        for part in (
            'backbone',
            'neck',
            'roi_head.bbox_head',
            'roi_head.mask_head',
            'bbox_head',
        ):
            try:
                model.get_submodule(part)
            except AttributeError:
                continue
            assert any(p.startswith(f'{part}.') for p in parts), part

    # no other kind of convolution, except where mmseg has no say in it
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d) and m.bias is None:
            separable = 'depthwise_conv' in name or 'pointwise_conv' in name
            assert type(m) is (nn.Conv2d if separable else conv), name

    if any(isinstance(m, BATCH_NORMS) for m in norms.values()):
        norm_eval = cfg.model.backbone.get('norm_eval', False)
        assert norm_eval == (said == 'bn-frozen')
    if path.parent.name in ('retinanet', 'fcos') and norm is BCN:
        levels = {m.num_levels for n, m in norms.items() if 'bbox_head' in n}
        assert levels == {5}
    check_name(path, cfg)
    if said == 'bcn-ws' and path.parent.name != 'quickstart':
        check_start(path, cfg.model.backbone, model)


def check_start(path, said, model):
    """The file that training starts from, of which the backbone is one."""
    convs = [m for m in model.modules() if isinstance(m, WSConv2d)]
    assert {m.dialect for m in convs} == {'var'}
    if path.parent.name in ('resnet', 'cityscapes'):  # their COCO model has it
        assert not said.get('init_cfg')
        return
    x50 = said.type == 'ResNeXt'
    name = f'{"rx" if x50 else "rn"}{said.depth}_bcn_ws_mm.pth'
    assert said.init_cfg == dict(type='Pretrained', checkpoint=f'checkpoints/{name}')
    with torch.device('meta'):
        more = dict(groups=32, base=4) if x50 else {}
        theirs = authors.Backbone(said.depth, **more)
    backbone = model.backbone
    own = {k: v.shape for k, v in backbone.named_parameters()}
    for name, m in theirs.named_modules():
        if isinstance(m, authors.Norm):
            assert own.pop(f'{name}.weight') == (32,)
            assert own.pop(f'{name}.bias') == (32,)
            channels = m.pbn.weight.shape
            assert own.pop(f'{name}.batch_weight') == channels
            assert own.pop(f'{name}.batch_bias') == channels
        elif isinstance(m, authors.Conv):
            assert own.pop(f'{name}.weight') == m.weight.shape
            assert backbone.get_submodule(name).stride == m.stride or dilated(said)
    assert not own


def dilated(backbone):
    """Stages of a segmenter dilate where ImageNet's have strides."""
    return backbone.get('strides', (1, 2, 2, 2)) != (1, 2, 2, 2)


def check_name(path, cfg):
    """The backbone, schedule and size that a recipe's name says."""
    backbone, name = cfg.model.backbone, path.stem
    depth = re.search(r'(?:[-_][rx]|resnet)(\d+)', name).group(1)
    assert backbone.depth == int(depth)
    assert (backbone.type == 'ResNeXt') == ('_x50' in name)
    if '_coco' in name:
        epochs = {'1x': 12, '2x': 24}[name.split('_')[-2]]
        assert cfg.train_cfg.max_epochs == epochs
        assert cfg.param_scheduler[-1].end == epochs
        assert cfg.param_scheduler[-1].milestones[-1] < epochs
    size = re.search(r'(\d+)x(\d+)$', name)
    if size:
        size = tuple(map(int, size.groups()))
        assert tuple(cfg.model.data_preprocessor.size) == size
        crops = [
            d.crop_size
            for d in dicts(cfg.train_dataloader)
            if d.get('type') == 'RandomCrop'
        ]
        assert crops and all(tuple(crop) == size for crop in crops)


def dicts(node):
    """All dicts in a config, outer ones first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        yield from chain.from_iterable(map(dicts, node))


def norms_of(model):
    for name, m in model.named_modules():
        if isinstance(m, (BATCH_NORMS, nn.GroupNorm)):
            yield name, m


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


STEPS = 3
SIZES = {(512, 1024): (32, 64), (769, 769): (49, 49), (513, 513): (49, 49)}


def reduced(path, roots, work_dir):
    """The recipe with small pictures and few proposals, from scratch."""
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
    for d in dicts(cfg._cfg_dict):
        kind = d.get('type')
        for key, value in d.items():
            for old, new in root.items():
                if isinstance(value, str) and value.startswith(old):
                    d[key] = value.replace(old, f'{roots[new]}/', 1)
        if kind in ('Resize', 'RandomResize') and 'scale' in d:
            d.scale = [size] * 2 if isinstance(d.scale, list) else size
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
    cfg.load_from = None

    if cfg.train_cfg.get('type') == 'IterBasedTrainLoop':
        cfg.train_cfg.update(max_iters=STEPS, val_interval=STEPS)
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
        dataset = cfg.train_dataloader.dataset
        dataset.get('dataset', dataset).indices = STEPS * batch
    cfg.val_dataloader.dataset.indices = 2
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
    return runner.model, record


@pytest.mark.real_data
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else pytest.mark.slow)
        for p in RECIPES
    ],
)
def test_trains(path, roots, tmp_path):
    model, record = train(reduced(path, roots, tmp_path))
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
    for name, buffer in model.named_buffers():
        if re.search(r'running_(mean|var)$', name):
            estimates += 1
            start = 0 if name.endswith('mean') else 1
            moved = buffer.reshape(-1, buffer.shape[-1]) != start
            assert torch.isfinite(buffer).all(), name
            assert moved.any(1).all() == (said != 'bn-frozen'), name
    assert (estimates > 0) == (not said.startswith('gn'))


@pytest.mark.slow
@pytest.mark.real_data
def test_starts_from_the_authors_model(real_data, tmp_path, python):
    """Converted as the README says, it is in the backbone, bit by bit."""
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
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.'
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


def test_model_index():
    """mim finds every recipe, once."""
    listed, names = [], set()
    for metafile in yaml.safe_load((ROOT / 'model-index.yml').open())['Import']:
        content = yaml.safe_load((ROOT / metafile).open())
        collections = {c['Name'] for c in content['Collections']}
        for c in content['Collections']:
            assert (ROOT / c['README']).is_file()
            assert c['Paper']['URL'] and c['Paper']['Title'] and c['Code']
        for m in content['Models']:
            assert m['In Collection'] in collections
            assert m['Name'] == Path(m['Config']).stem
            assert Path(m['Config']).parent == Path(metafile).parent
            assert m['Name'] not in names
            names.add(m['Name'])
            listed.append(ROOT / m['Config'])
    assert sorted(listed) == RECIPES
    assert names >= QUICK


def test_model_index_as_mim_reads_it():
    modelindex = pytest.importorskip(
        'modelindex.load_model_index', reason='modelindex is not installed'
    )
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert len(index.models) == len(RECIPES)


@pytest.mark.parametrize(
    'folder', sorted({p.parent for p in RECIPES}), ids=lambda f: f.name
)
def test_readme_links_every_recipe(folder):
    text = (folder / 'README.md').read_text()
    links = re.findall(r'\]\(([^)#:]+\.(?:py|md))\)', text)
    assert all((folder / link).is_file() for link in links)
    recipes = {p.name for p in folder.glob('*.py')}
    assert recipes == {link for link in links if link.endswith('.py')}


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
    # a whole picture of Cityscapes takes long
    count = dict(coco=3, cityscapes=1)[data]
    quiet += [f'{n}_dataloader.dataset.indices={count}' for n in few]
    quiet += ['default_hooks.logger.interval=1']
    quiet += ['model.backbone.init_cfg=None']
    if data == 'coco':
        annotations = f'{root}annotations/instances_val2017.json'
        quiet += [f'{n}_evaluator.ann_file={annotations}' for n in few] + [
            'train_cfg.max_epochs=1',
            f'train_dataloader.dataset.indices={steps}',
            'train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
            'model.test_cfg.rcnn.score_thr=0',
        ]
        more = [
            'train_cfg.max_epochs=2',
            'train_cfg.val_interval=3',
            'train_dataloader.dataset.indices=1',
        ]
    else:
        quiet += [
            f'train_cfg.max_iters={steps}',
            f'train_cfg.val_interval={steps}',
            f'default_hooks.checkpoint.interval={steps}',
        ]
        more = [
            f'train_cfg.max_iters={steps + 1}',
            f'train_cfg.val_interval={steps + 5}',
            f'default_hooks.checkpoint.interval={steps + 5}',
        ]
    python(
        'tools/train.py',
        config,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *quiet,
        timeout=1100,
    )
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
    python(
        'tools/test.py',
        config,
        checkpoint,
        '--work-dir',
        tmp_path / 'test',
        '--cfg-options',
        *quiet,
        timeout=1100,
    )
    (file,) = (tmp_path / 'test').glob('*/2*.json')
    assert json.loads(file.read_text())[key] == pytest.approx(validated, abs=1e-3)
    resumed = dumping(config, tmp_path)
    python(
        'tools/train.py',
        resumed,
        '--work-dir',
        tmp_path / 'more',
        '--resume',
        checkpoint,
        '--cfg-options',
        *quiet,
        *more,
        timeout=1100,
        PYTHONPATH=str(ROOT / 'tests'),
    )
    check_dump(tmp_path, checkpoint, steps)
    print(f'{data}: losses {losses}, {key} {validated}')


def scalars(folder):
    (file,) = Path(folder).glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.open()]
