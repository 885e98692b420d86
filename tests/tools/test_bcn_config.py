"""The converter's command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mmdet
import mmseg
import pytest
from conftest import ROOT, run
from mmengine.config import Config
from support.stacks import IS_FORK

from bcn_mm.convert import read_config, to_bcn

pytestmark = pytest.mark.slow
TOOL = 'tools/misc/bcn_config.py'
RETINA = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
YOLOX = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
BISENET = 'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py'
DEEPLAB = 'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'


def test_writes_what_it_shows_and_once_more_nothing(tmp_path, python):
    out = tmp_path / 'new' / 'fcos.py'
    options = ['--ws', '--batch-size', 1]
    shown = python(TOOL, FCOS, '-o', out, *options, COLUMNS='160')
    for words in (
        r'model\.backbone\.init_cfg .*without',
        r'model\.bbox_head\.norm_cfg .*num_groups=32.*BCN',
        r'model\.bbox_head\.norm_cfg\.num_levels .*5',
        r'train_dataloader\.batch_size .*2 .*1 ',
        r'optim_wrapper\.optimizer\.lr .*times 0\.5',
    ):
        assert re.search(words, shown), words
    want = to_bcn(read_config(FCOS), ws=True, batch_size=1)
    assert Config.fromfile(out).to_dict() == want.to_dict()
    again = tmp_path / 'new' / 'again.py'
    shown = python(TOOL, out, '-o', again, *options)
    assert 'Nothing to change.' in shown
    assert Config.fromfile(again).to_dict() == want.to_dict()
    assert again.read_text().split() == ['_base_', '=', "'fcos.py'"]


def test_says_that_eps_is_kept(tmp_path, python):
    out = tmp_path / 'c.py'
    shown = python(TOOL, YOLOX, '-o', out, COLUMNS='200')
    row = r'model\.backbone\.norm_cfg .*eps=0\.001.*BCN.*eps=0\.001.*eps kept'
    assert re.search(row, shown), shown
    for part in ('backbone', 'neck', 'bbox_head'):
        norm_cfg = Config.fromfile(out).model[part].norm_cfg
        assert norm_cfg == dict(type='BCN', eps=1e-3)


def test_options(tmp_path, python):
    out = tmp_path / 'c.py'
    shown = python(
        TOOL,
        BISENET,
        '-o',
        out,
        '--only',
        'heads,neck',
        '--norm-cfg',
        'type=SyncBCN',
        'momentum=0.05',
        COLUMNS='160',
    )
    assert re.search(r'model\.backbone .*BatchNorm2d.*not in --only', shown)
    cfg = Config.fromfile(out)
    assert cfg.model.decode_head.norm_cfg == dict(type='SyncBCN', momentum=0.05)
    assert cfg.model.backbone.type == 'BiSeNetV1'


def test_what_is_left_is_said_once(tmp_path, python):
    shown = python(
        *(TOOL, FCOS, '-o', tmp_path / 'c.py', '--dry-run', '--only', 'neck'),
        COLUMNS='200',
    )
    rows = re.findall(r'^ *model\.(\w+) +(\d+ x \w+) ', shown, re.M)
    assert len(rows) == len(set(rows)) >= 2


def test_as_many_pictures(tmp_path, python):
    out = tmp_path / 'c.py'
    python(TOOL, BISENET, '-o', out, '--batch-size', 1, '--keep-epochs')
    assert Config.fromfile(out).train_cfg.max_iters == 4 * 160_000


@pytest.mark.parametrize(
    'words, message',
    [
        (['gone.py', '-o', 'x.py'], 'config gone.py does not exist'),
        (['mmdet::fcos/gone.py', '-o', 'x.py'], 'ships no config'),
        (['nonesuch::a/b.py', '-o', 'x.py'], 'nonesuch is not installed'),
        ([RETINA, '-o', 'x.json'], 'must be a .py file'),
        ([RETINA, '-o', 'x.py', '--only', 'feet'], 'unknown part feet'),
        ([RETINA, '-o', 'x.py', '--batch-size', '0'], 'must be positive'),
        ([RETINA, '-o', 'x.py', '--norm-cfg', 'type=BCN', 'momentun=1'], 'momentun'),
        ([RETINA, '-o', 'x.py', '--norm-cfg', 'BCN'], "'BCN' must be KEY=VALUE"),
        ([RETINA, '-o', 'x.py', '--keep-epochs'], 'needs --batch-size'),
        ([RETINA, '-o', 'x.py', '--norm-cfg', 'type=Foo'], 'Foo is not registered'),
        ([RETINA, '-o', 'x.py', '--norm-cfg', 'type=SyncBN'], 'SyncBN is no BCN'),
        ([RETINA, '-o', 'x.py', '--pretrained', 'no.pth'], 'no.pth does not exist'),
    ],
)
def test_bad_input(words, message, tmp_path):
    tool = Path(TOOL).resolve()
    done = run(sys.executable, tool, *words, cwd=tmp_path)
    (line,) = re.findall('^error: .*$', done.stdout, re.M)
    assert done.returncode == 1 and message in line, done.stdout
    assert 'Traceback' not in done.stdout and not list(tmp_path.iterdir())


def files_in(folder):
    return {path: path.read_text() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('target', ['a.py', 'b.py', 'c.py', 'link.py', 'folder/c.py'])
def test_what_a_source_inherits_from_is_not_replaced(target, tmp_path, refused):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'a.py').write_text("_base_ = ['b.py']\n")
    (tmp_path / 'b.py').write_text("_base_ = './folder/../folder/c.py'\n")
    (tmp_path / 'c.py').symlink_to('folder/c.py')
    (tmp_path / 'folder/c.py').write_text('model = dict(type="RetinaNet")\n')
    (tmp_path / 'link.py').symlink_to('b.py')
    before = files_in(tmp_path)
    line = refused(TOOL, tmp_path / 'a.py', '-o', tmp_path / target, '--force')
    assert 'inherit from itself' in line and target in line
    assert files_in(tmp_path) == before


def test_nothing_is_replaced_unasked(tmp_path, python, refused):
    out = tmp_path / 'c.py'
    out.write_text('mine = 1\n')
    assert '--force replaces it' in refused(TOOL, RETINA, '-o', out)
    assert out.read_text() == 'mine = 1\n'
    shown = python(TOOL, RETINA, '-o', out, '--dry-run', COLUMNS='')
    assert 'model.backbone.norm_cfg' in shown and 'Nothing was written.' in shown
    assert out.read_text() == 'mine = 1\n'
    assert python(TOOL, RETINA, '-o', out, '--force', '--quiet') == ''
    assert Config.fromfile(out).model.backbone.norm_cfg == dict(type='BCN')


def test_the_difference_is_one_that_patch_knows(tmp_path, python):
    out = tmp_path / 'c.py'
    shown = python(TOOL, RETINA, '-o', out, '--diff')
    lines = shown.splitlines()
    assert lines[0] == f'--- {RETINA}' and lines[1] == f'+++ {out}'
    for sign, norm in (('-', 'BN'), ('+', 'BCN')):
        assert any(x[:1] == sign and f"type='{norm}'" in x for x in lines)


def test_what_a_source_prints_is_not_in_the_difference(tmp_path):
    source = tmp_path / 'a.py'
    source.write_text(f"_base_ = '{RETINA}'\nprint('heard')\n")
    done = subprocess.run(
        [sys.executable, TOOL, source, '-o', tmp_path / 'c.py', '--diff'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and 'heard' in done.stderr
    assert done.stdout.startswith(f'--- {source}') and 'heard' not in done.stdout


def test_a_list_shows_what_was_added_and_a_pipe_folds_nothing(tmp_path, python):
    source = tmp_path / 'a.py'
    source.write_text(
        f"_base_ = '{RETINA}'\n"
        "custom_hooks = [dict(type='EMAHook'), dict(type='SyncBuffersHook')]\n"
        "custom_imports = dict(imports=['json'], allow_failed_imports=False)\n"
    )
    shown = python(TOOL, source, '-o', tmp_path / 'b.py', COLUMNS='')
    (hooks,) = re.findall('custom_hooks .*', shown)
    assert "and dict(type='SyncEstimatesHook')" in hooks and 'EMAHook' not in hooks
    (imports,) = re.findall(r'custom_imports\.imports .*', shown)
    assert "and 'bcn_mm'" in imports
    assert "dict(type='Pretrained', checkpoint='torchvision://resnet50')" in shown


def test_norm_cfg_of_one_setting(tmp_path, python):
    out = tmp_path / 'c.py'
    python(TOOL, RETINA, '-o', out, '--norm-cfg', 'num_groups=8')
    assert Config.fromfile(out).model.backbone.norm_cfg == dict(
        type='BCN', num_groups=8
    )


def test_a_recipe_becomes_one_that_stock_tools_read(tmp_path, python):
    recipe = 'bcn_mm::retinanet/retinanet_r50_fpn_bcn-ws-all_1x_coco.py'
    out = tmp_path / 'c.py'
    python(TOOL, recipe, '-o', out, '--batch-size', 1)
    assert 'bcn_mm::' not in out.read_text() and 'mmdet::' in out.read_text()
    script = tmp_path / 'read.py'
    script.write_text(
        'import sys\n'
        'from mmengine.config import Config\n'
        'assert "bcn_mm" not in sys.modules\n'
        f'print(Config.fromfile({str(out)!r}).model.backbone.norm_cfg)\n'
    )
    assert "'BCN'" in python(script)
    want = to_bcn(read_config(recipe), batch_size=1)
    assert Config.fromfile(out).to_dict() == want.to_dict()


def options_of(data, loaders, **more):
    options = dict(more)
    for loader in loaders:
        options.update(
            {
                f'{loader}_dataloader.dataset.data_root': f'{data}/',
                f'{loader}_dataloader.num_workers': 0,
                f'{loader}_dataloader.persistent_workers': False,
            }
        )
    for loader in loaders[1:]:
        options[f'{loader}_dataloader.dataset.indices'] = 2
    return ['--cfg-options', *(f'{k}={v}' for k, v in options.items())]


@pytest.mark.real_data
def test_converted_retinanet_runs_with_mmdets_tools(real_data, tmp_path, python):
    out = tmp_path / 'retinanet_bcn.py'
    python(TOOL, RETINA, '-o', out, '--ws', '--batch-size', 1)
    train = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    annotations = real_data / 'coco/annotations/instances_val2017.json'
    options = {
        'train_dataloader.dataset.indices': 3,
        'train_dataloader.dataset.pipeline.2.scale': '(320,200)',
        'val_dataloader.dataset.pipeline.1.scale': '(320,200)',
        'val_evaluator.ann_file': annotations,
        'model.test_cfg.score_thr': 0,  # an untrained model finds things
        'train_cfg.max_epochs': 1,
        'default_hooks.logger.interval': 1,
    }
    check_run(
        python,
        train,
        out,
        tmp_path,
        'coco/bbox_mAP',
        options_of(real_data / 'coco', ('train', 'val', 'test'), **options),
    )


@pytest.mark.skipif(
    IS_FORK,
    reason="the fork's mmengine does not find mmseg:: before bcn_mm is imported",
)
@pytest.mark.real_data
def test_converted_deeplab_runs_with_mmsegs_tools(real_data, tmp_path, python):
    out = tmp_path / 'deeplab_bcn.py'
    python(TOOL, DEEPLAB, '-o', out, '--batch-size', 1)
    train = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'train.py'
    options = {
        'model.pretrained': None,
        'train_dataloader.dataset.pipeline.2.scale': '(512,256)',
        'train_dataloader.dataset.pipeline.3.crop_size': '(128,256)',
        'model.data_preprocessor.size': '(128,256)',
        'val_dataloader.dataset.pipeline.1.scale': '(512,256)',
        'train_cfg.max_iters': 3,
        'train_cfg.val_interval': 3,
        'default_hooks.logger.interval': 1,
    }
    check_run(
        python,
        train,
        out,
        tmp_path,
        'mIoU',
        options_of(real_data / 'cityscapes', ('train', 'val', 'test'), **options),
    )


def check_run(python, train, config, folder, metric, options):
    python(train, config, '--work-dir', folder / 'work', *options, cwd=folder)
    (file,) = folder.glob('work/*/vis_data/scalars.json')
    rows = [json.loads(line) for line in file.open()]
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 3 and all(0 < x < 1e3 for x in losses)
    assert [row for row in rows if metric in row]
