"""The commands, run as users run them, on real mmdet and mmseg."""

import json
import re
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from conftest import ROOT, run
from support.dump_state import check_dump, dumping

pytestmark = pytest.mark.slow

CONFIGS = {
    'det': 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py',
    'seg': 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py',
}
# one pass over 12 pictures, a checkpoint half-way
SHORT = {
    'det': [
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=2',
        'model.test_cfg.rcnn.score_thr=0',  # an untrained model finds things
        'model.test_cfg.rcnn.max_per_img=10',  # which take long to draw
    ],
    'seg': [
        'train_cfg.max_iters=24',
        'train_cfg.val_interval=24',
        'default_hooks.checkpoint.interval=12',
    ],
}
QUIET = [
    'default_hooks.logger.interval=4',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'default_hooks.checkpoint.max_keep_ckpts=5',
]
KEYS = {'det': ('coco/bbox_mAP', 'coco/segm_mAP'), 'seg': ('mIoU', 'aAcc')}


def scalars(work_dir):
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for f in files for line in f.open()]


def metrics(work_dir):
    (file,) = Path(work_dir).glob('*/2*.json')
    return json.loads(file.read_text())


def checkpoints(work_dir):
    return sorted(
        Path(work_dir).glob('*.pth'),
        key=lambda f: int(re.findall(r'\d+', f.name)[-1]),
    )


@pytest.fixture(scope='module', params=CONFIGS)
def trained(request, shapes, tmp_path_factory, python):
    """A model of each kind, trained for a few steps; (task, folder)."""
    task = request.param
    folder = tmp_path_factory.mktemp(task)
    python(
        'tools/train.py',
        CONFIGS[task],
        '--work-dir',
        folder,
        '--cfg-options',
        *SHORT[task],
        *QUIET,
        SHAPES_ROOT=str(shapes),
    )
    return task, folder


def test_train_logs_and_moves_every_estimate(trained):
    task, folder = trained
    losses = [r['loss'] for r in scalars(folder) if 'loss' in r]
    assert len(losses) >= 4 and all(0 < x < 1e3 for x in losses)
    state = torch.load(checkpoints(folder)[-1])['state_dict']
    means = {k: v for k, v in state.items() if k.endswith('running_mean')}
    assert len(means) > 20
    for name, value in means.items():
        assert value.abs().max() > 0, name
        assert state[name.replace('mean', 'var')].ne(1).any(), name


def test_test_repeats_the_validation(trained, shapes, tmp_path, python):
    task, folder = trained
    out = tmp_path / ('out.pkl' if task == 'det' else 'maps')
    python(
        'tools/test.py',
        CONFIGS[task],
        checkpoints(folder)[-1],
        '--work-dir',
        tmp_path / 'test',
        '--out',
        out,
        '--show-dir',
        tmp_path / 'pictures',
        '--cfg-options',
        *QUIET,
        *SHORT[task],
        SHAPES_ROOT=str(shapes),
    )
    validated = [r for r in scalars(folder) if KEYS[task][0] in r][-1]
    tested = metrics(tmp_path / 'test')
    for key in KEYS[task]:
        assert tested[key] == pytest.approx(validated[key], abs=1e-3)
    pictures = list((tmp_path / 'pictures').rglob('*.[jp][pn]g'))
    assert len(pictures) == 6
    assert out.exists() and not list(tmp_path.glob('*.part*'))
    if task == 'seg':
        assert len(list(out.iterdir())) == 6


def test_tta(trained, shapes, tmp_path, python):
    task, folder = trained
    boxes = [
        'model.type=FasterRCNN',
        'model.roi_head.mask_head=None',
        'model.roi_head.mask_roi_extractor=None',
        'val_evaluator.metric=bbox',
        'test_evaluator.metric=bbox',
        'train_cfg.max_epochs=1',
        *SHORT['det'][1:],
        *QUIET,
    ]
    options = dict(det=boxes, seg=QUIET)[task]
    words = ['--tta', '--work-dir', tmp_path / 'test', '--cfg-options']
    environment = dict(SHAPES_ROOT=str(shapes))
    if task == 'det':
        done = run(
            sys.executable,
            'tools/test.py',
            CONFIGS[task],
            checkpoints(folder)[-1],
            *words[:-1],
            **environment,
        )
        assert 'cannot merge masks' in one_line(done)
        python(
            'tools/train.py',
            CONFIGS[task],
            '--work-dir',
            tmp_path,
            '--cfg-options',
            *options,
            **environment,
        )
        folder = tmp_path
    python(
        'tools/test.py',
        CONFIGS[task],
        checkpoints(folder)[-1],
        *words,
        *options,
        **environment,
    )
    assert metrics(tmp_path / 'test')[KEYS[task][0]] >= 0


def test_resume_starts_bit_for_bit(trained, shapes, tmp_path, python):
    """From the right step, with every parameter, estimate and momentum."""
    task, folder = trained
    half = checkpoints(folder)[0]
    python(
        'tools/train.py',
        dumping(ROOT / CONFIGS[task], tmp_path),
        '--work-dir',
        tmp_path,
        '--resume',
        half,
        '--cfg-options',
        *SHORT[task],
        *QUIET,
        SHAPES_ROOT=str(shapes),
    )
    check_dump(tmp_path, half, 12)
    steps = [r['step'] for r in scalars(tmp_path) if 'loss' in r]
    assert steps == [16, 20, 24]


def test_auto_resume(trained, shapes, tmp_path, python):
    """``--resume`` alone: from the start, then from the newest checkpoint."""
    task, _ = trained
    words = [
        'tools/train.py',
        CONFIGS[task].replace('configs/', 'bcn_mm::'),
        '--work-dir',
        tmp_path,
        '--resume',
        '--cfg-options',
        *QUIET,
    ]
    short = dict(det='train_cfg.max_epochs=1', seg='train_cfg.max_iters=12')
    every = [SHORT[task][-1]] if task == 'seg' else []
    python(*words, short[task], *every, SHAPES_ROOT=str(shapes))
    python(*words, *SHORT[task], SHAPES_ROOT=str(shapes))
    steps = [r['step'] for r in scalars(tmp_path) if 'loss' in r]
    assert steps == [4, 8, 12, 16, 20, 24]
    assert (tmp_path / Path(CONFIGS[task]).name).is_file()  # under its own name


def test_stock_tools_through_custom_imports(shapes, tmp_path, python):
    """mmdet's own train.py and test.py, as installed, know nothing of us."""
    tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    shared = ['--cfg-options', *SHORT['det'], *QUIET]
    environment = dict(SHAPES_ROOT=str(shapes))
    python(
        tools / 'train.py',
        CONFIGS['det'],
        '--work-dir',
        tmp_path / 'a',
        *shared,
        **environment,
    )
    end = checkpoints(tmp_path / 'a')[-1]
    python(
        tools / 'test.py',
        CONFIGS['det'],
        end,
        '--work-dir',
        tmp_path / 'b',
        *shared,
        **environment,
    )
    assert 'coco/bbox_mAP' in metrics(tmp_path / 'b')


# -- bad input ends in one line ----------------------------------------------

CFG = '--cfg-options'
NO_BCN = [
    *('model.backbone.norm_cfg.type=BN', 'model.neck.norm_cfg.type=BN'),
    'model.roi_head.bbox_head.norm_cfg.type=BN',
    'model.roi_head.mask_head.norm_cfg.type=BN',
]
BAD = {
    'norm at the top': (
        [CFG, 'norm_cfg.type=BCN', *NO_BCN],
        r"norm_cfg at the top .* is BCN, but no norm .*norm_cfg=dict\(type='BCN'\)",
    ),
    'groups': (
        [CFG, 'model.backbone.norm_cfg.num_groups=7'],
        r'num_groups=7 does not divide 32',
    ),
    'argument': (
        [CFG, 'model.neck.norm_cfg.momentun=0.1'],
        r"unexpected keyword argument 'momentun'",
    ),
    'dialect': (
        [CFG, 'model.neck.conv_cfg.dialect=jhu'],
        r"unknown weight standardization dialect 'jhu'",
    ),
    'annotations': (
        [CFG, 'train_dataloader.dataset.ann_file=none.json'],
        r'none\.json',
    ),
    'validation annotations': (
        [CFG, 'val_evaluator.ann_file=gone.json'],
        r'gone\.json',
    ),
    'resume': (['--resume', 'gone.pth'], 'gone.pth does not exist'),
    'amp': (['--amp'], 'only available training on gpu'),
    'scale': (['--auto-scale-lr'], 'base_batch_size'),
}


def one_line(done):
    assert done.returncode == 1, done.stdout[-3000:]
    assert 'Traceback' not in done.stdout, done.stdout[-3000:]
    (line,) = re.findall('^error: .*$', done.stdout, re.M)
    return line


@pytest.mark.parametrize('words, message', BAD.values(), ids=BAD)
def test_bad_input_to_train(words, message, shapes, tmp_path):
    done = run(
        sys.executable,
        'tools/train.py',
        CONFIGS['det'],
        '--work-dir',
        tmp_path / 'w',
        *words,
        SHAPES_ROOT=str(shapes),
        timeout=120,
    )
    assert re.search(message, one_line(done))
    assert not list(tmp_path.iterdir())


def starting_from(file):
    config = file.with_suffix('.py')
    start = dict(type='Pretrained', checkpoint=str(file), prefix='backbone')
    start['_delete_'] = True
    config.write_text(
        f"_base_ = '{ROOT / CONFIGS['det']}'\n"
        f'model = dict(backbone=dict(init_cfg={start}))\n'
    )
    return config


WAYS = {
    'test': lambda file: ('tools/test.py', CONFIGS['det'], file, CFG),
    'resume': lambda file: ('tools/train.py', CONFIGS['det'], '--resume', file, CFG),
    'load_from': lambda file: (
        *('tools/train.py', CONFIGS['det'], CFG, f'load_from={file}'),
    ),
    'init_cfg': lambda file: ('tools/train.py', starting_from(file), CFG),
}


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_weights_of_another_dialect(way, trained, shapes, tmp_path):
    task, folder = trained
    if task != 'det':
        pytest.skip('one task is enough')
    words = [*way(checkpoints(folder)[-1]), 'model.backbone.conv_cfg.dialect=var']
    words += ['work_dir=' + str(tmp_path / 'w')]
    done = run(sys.executable, *words, *SHORT['det'], SHAPES_ROOT=str(shapes))
    line = one_line(done)
    assert re.search("backbone.conv1: .*dialect='std'.*with 'var'; set conv_cfg", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'recipe, theirs',
    [
        ('mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco', 'rn50_bcn_ws'),
        (
            'deeplabv3/deeplabv3_r101-d16_bcn-ws_8xb2-33k_voc12aug-513x513',
            'rn101_bcn_ws',
        ),
    ],
)
def test_missing_start(recipe, theirs, tmp_path):
    """Said before any data is asked for, of which there is none."""
    config = ROOT / f'configs/{recipe}.py'
    words = [sys.executable, ROOT / 'tools/train.py', config]
    line = one_line(run(*words, cwd=tmp_path))
    target = f'checkpoints/{theirs}_mm.pth'
    assert f'checkpoint {target} does not exist' in line
    command = f'tools/model_converters/authors_to_mm.py {theirs}.pth {target}'
    assert command in line
    assert re.search(r'checkpoint=open-mmlab://jhu/resnet(50|101)_gn_ws ', line)
    assert not list(tmp_path.iterdir())
    (option,) = re.findall(r'--cfg-options (\S+=None)', line)
    line = one_line(run(*words, '--cfg-options', option, cwd=tmp_path))
    assert 'checkpoints' not in line and 'data/' in line


def test_damaged_start(tmp_path):
    torch.save({'conv1.weight': torch.tensor(torch.nan)}, tmp_path / 'a.pth')
    line = one_line(
        run(
            sys.executable,
            'tools/train.py',
            'configs/mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_2x_coco.py',
            CFG,
            f'model.backbone.init_cfg.checkpoint={tmp_path / "a.pth"}',
            '--work-dir',
            tmp_path / 'w',
        )
    )
    assert re.search(r'a\.pth: conv1\.weight holds NaN', line)


FULL = """
import os

def full(fd, _sync=os.fsync):
    import os
    if 'iter_24' in os.readlink(f'/proc/self/fd/{fd}'):
        raise OSError(28, 'No space left on device')
    _sync(fd)

os.fsync = full
"""


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='needs /proc')
def test_full_disk(shapes, tmp_path):
    """At the second checkpoint, of one that is kept."""
    config = tmp_path / 'full.py'
    config.write_text(f'_base_ = {str(ROOT / CONFIGS["seg"])!r}\n{FULL}')
    work_dir = tmp_path / 'w'
    work_dir.mkdir()
    (work_dir / 'iter_9.pth.part').write_text('of a process that was killed')
    words = ['--work-dir', work_dir, CFG, *SHORT['seg'], *QUIET]
    words[-1] = 'default_hooks.checkpoint.max_keep_ckpts=1'
    done = run(
        sys.executable, 'tools/train.py', config, *words, SHAPES_ROOT=str(shapes)
    )
    line = one_line(done)
    assert f'disk full: {work_dir / "iter_24.pth"} (' in line and '--resume' in line
    assert [f.name for f in work_dir.glob('*.pth*')] == ['iter_12.pth']
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'iter_12.pth')
    assert torch.load(work_dir / 'iter_12.pth')['meta']['iter'] == 12


@pytest.mark.parametrize(
    'script',
    [
        'train.py',
        'test.py',
        'quickstart.py',
        'dataset_converters/make_shapes.py',
    ],
)
def test_help(script):
    done = run(sys.executable, f'tools/{script}', '--help')
    assert done.returncode == 0 and 'usage' in done.stdout


@pytest.mark.parametrize('script', ['setup_env.sh', 'run_tests.sh'])
def test_shell_help(script):
    done = run('bash', ROOT / 'tools' / script, '--help')
    assert done.returncode == 0 and f'tools/{script}' in done.stdout
