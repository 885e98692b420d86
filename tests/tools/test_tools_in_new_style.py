"""The tools on configs that import their types instead of naming them."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from support.class_configs import write_class_config
from support.stacks import IS_FORK

pytestmark = pytest.mark.slow

CONFIGS = {
    'det': 'configs/quickstart/mask-rcnn_r18_bcn-ws_shapes.py',
    'seg': 'configs/quickstart/deeplabv3_r18-d8_bcn-ws_shapes.py',
}
STOCK = {
    'det': ('mmdet', 'configs/quickstart/mask-rcnn_r18_bn_shapes.py'),
    'seg': ('mmseg', 'configs/quickstart/deeplabv3_r18-d8_bn_shapes.py'),
}
SHORT = """
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader.update(num_workers=0, persistent_workers=False)
default_hooks['logger']['interval'] = 1
"""
TWO_STEPS = {
    'det': """
train_cfg.update(max_epochs=1, val_interval=1)
train_dataloader['dataset'].update(indices=2)
model['test_cfg']['rcnn'].update(score_thr=0, max_per_img=10)
""",
    'seg': """
train_cfg.update(max_iters=2, val_interval=2)
default_hooks['checkpoint'].update(interval=2)
""",
}
BOXES = """
from mmdet.models.detectors import FasterRCNN
model.update(type=FasterRCNN)
model['roi_head'].update(mask_head=None, mask_roi_extractor=None)
test_evaluator.update(metric='bbox')
"""


@pytest.fixture(scope='module', params=CONFIGS)
def trained(request, shapes, tmp_path_factory, python):
    """A model of each kind, trained for two steps; (task, config, checkpoint)."""
    task = request.param
    folder = tmp_path_factory.mktemp(f'new_{task}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SHAPES_ROOT', str(shapes))
        text = SHORT + TWO_STEPS[task]
        config = write_class_config(CONFIGS[task], folder / 'configs', text)
    python('tools/train.py', config, '--work-dir', folder / 'w')
    log = next((folder / 'w').glob('*/vis_data/scalars.json')).read_text()
    assert [r['step'] for r in map(json.loads, log.splitlines()) if 'loss' in r] == [
        1,
        2,
    ]
    (checkpoint,) = (folder / 'w').glob('*.pth')
    return task, config, checkpoint


@pytest.mark.parametrize('task', CONFIGS)
def test_converted_ones_run_with_stock_tools_and_ours(task, shapes, tmp_path, python):
    """BatchNorm's, converted in their style, by tools that know nothing of it."""
    package, source = STOCK[task]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SHAPES_ROOT', str(shapes))
        text = SHORT + TWO_STEPS[task]
        stock = write_class_config(source, tmp_path / 'configs', text)
    config = tmp_path / 'configs' / 'bcn.py'
    python('tools/misc/bcn_config.py', stock, '-o', config, '--ws', '--quiet')
    theirs = Path(find_spec(package).origin).parent / '.mim' / 'tools'
    python(theirs / 'train.py', config, '--work-dir', tmp_path / 'w')
    (checkpoint,) = (tmp_path / 'w').glob('*.pth')
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    ages = {k: v for k, v in state.items() if k.endswith('num_batches_tracked')}
    assert len(ages) >= 20 and all(ages.values())
    for tools in (theirs, ROOT / 'tools'):
        out = tmp_path / tools.parent.name
        python(tools / 'test.py', config, checkpoint, '--work-dir', out)
        (file,) = out.glob('*/2*.json')
        assert {'det': 'coco/bbox_mAP', 'seg': 'mIoU'}[task] in file.read_text()


def test_predictions_are_drawn_and_kept(trained, tmp_path, python):
    task, config, checkpoint = trained
    out = tmp_path / ('out.pkl' if task == 'det' else 'maps')
    words = ['--show-dir', tmp_path / 'pictures', '--out', out]
    shown = python(
        'tools/test.py', config, checkpoint, '--work-dir', tmp_path / 'w', *words
    )
    assert len(list((tmp_path / 'pictures').rglob('*.[jp][pn]g'))) == 6
    assert out.exists()
    if task == 'det':  # not of its draft
        assert f'saved to {out}.' in shown


def test_augmented_views_are_merged(trained, tmp_path, python):
    task, config, checkpoint = trained
    if task == 'det':  # mmdet cannot merge masks
        config = config.with_name('boxes.py')
        config.write_text(trained[1].read_text() + BOXES)
        state = torch.load(checkpoint)['state_dict']
        state = {k: v for k, v in state.items() if 'mask_head' not in k}
        checkpoint = tmp_path / 'boxes.pth'
        torch.save(state, checkpoint)
    words = ['tools/test.py', config, checkpoint, '--work-dir', tmp_path / 'w']
    shown = python(*words, '--tta')
    assert re.search('bbox_mAP: |mIoU: ', shown)


def test_pictures_are_drawn(trained, shapes, tmp_path, python):
    _, config, checkpoint = trained
    words = ['tools/demo/image_demo.py', shapes / 'val', config, checkpoint]
    assert 'Wrote 6 pictures' in python(*words, '--out-dir', tmp_path / 'out')


INFER = """
import sys
from mmdet.apis import DetInferencer
assert 'bcn_mm' not in sys.modules
config, checkpoint, picture = sys.argv[1:]
detect = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
(found,) = detect(picture)['predictions']
print(len(found['scores']), 'objects by', sum(
    type(m).__module__.startswith('bcn_mm') for m in detect.model.modules()))
"""


@pytest.mark.skipif(
    IS_FORK, reason="the fork's DetInferencer takes types of transforms for names"
)
@pytest.mark.parametrize('trained', ['det'], indirect=True)
def test_mmdets_own_inference(trained, shapes, tmp_path, python):
    """Of the config and weights, by a program that knows nothing of bcn_mm."""
    _, config, checkpoint = trained
    (tmp_path / 'infer.py').write_text(INFER)
    weights, picture = tmp_path / 'weights.pth', next((shapes / 'val').iterdir())
    torch.save(torch.load(checkpoint)['state_dict'], weights)
    shown = python(tmp_path / 'infer.py', config, weights, picture)
    objects, layers = re.search(r'^(\d+) objects by (\d+)$', shown, re.M).groups()
    assert int(objects) == 10 and int(layers) > 40


def test_it_is_exported(trained, tmp_path, python):
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    _, config, checkpoint = trained
    shown = python(
        'tools/deployment/export_onnx.py',
        config,
        checkpoint,
        '--out',
        tmp_path / 'model.onnx',
        '--exporter',
        'trace',
        '--count',
        1,
    )
    assert 'largest relative difference' in shown


def test_mixed_precision_knows_the_class(trained, tmp_path):
    """Refused for want of a GPU, not for the wrapper."""
    _, config, _ = trained
    words = [sys.executable, 'tools/train.py', config, '--amp']
    done = run(*words, '--work-dir', tmp_path / 'w')
    if done.returncode:
        assert 'only available training on gpu' in done.stdout
        assert not (tmp_path / 'w').exists()
