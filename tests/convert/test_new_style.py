"""Configs that import their types, converted and written in their own style."""

import pickle
import sys

import pytest
from conftest import run
from mmengine.config import Config
from support.class_configs import write_class_config
from support.stock_configs import ZOO, model_of

from bcn_mm import BCN, SyncBCN, SyncEstimatesHook, WSConv2d
from bcn_mm.convert import leftovers, read_config, to_bcn, write_config
from bcn_mm.errors import InputError

EDIT = """
from torch.nn import GroupNorm
model['backbone'].update(depth=18)
model['neck'].update(in_channels=[64, 128, 256, 512])
model['bbox_head'].update(norm_cfg=dict(type=GroupNorm, num_groups=32))
"""


@pytest.fixture
def source(tmp_path):
    stock = ZOO / 'retinanet' / 'retinanet_r50_fpn_1x_coco.py'
    return write_class_config(stock, tmp_path / 'base', EDIT)


def test_conversion(source):
    changes = []
    cfg = to_bcn(read_config(str(source)), ws=True, batch_size=1, changes=changes)
    assert cfg.model.backbone.norm_cfg == dict(type=BCN)
    assert cfg.model.backbone.conv_cfg == dict(type=WSConv2d)
    assert cfg.model.backbone.init_cfg is None
    # five levels share the head's norms
    assert cfg.model.bbox_head.norm_cfg == dict(type=BCN, num_levels=5)
    assert cfg.custom_hooks == [dict(type=SyncEstimatesHook)]
    assert 'custom_imports' not in cfg
    assert cfg.optim_wrapper.optimizer.lr == 0.005
    assert not leftovers(model_of(cfg))
    again = []
    assert to_bcn(cfg, ws=True, changes=again).to_dict() == cfg.to_dict()
    assert all(c.before == c.after for c in again)


@pytest.mark.parametrize('where', ['base/bcn.py', 'bcn.py', 'other/folder/bcn.py'])
def test_written_in_the_same_style(where, source, tmp_path):
    cfg = to_bcn(read_config(str(source)), dict(type='SyncBCN'), ws=True, batch_size=1)
    out = tmp_path / where
    write_config(cfg, str(source), str(out))
    text = out.read_text()
    assert 'with read_base():' in text and '_base_' not in text
    assert 'from bcn_mm import SyncBCN, SyncEstimatesHook' in text
    assert 'FocalLoss' not in text  # only what changes
    assert max(map(len, text.splitlines())) <= 80
    read = Config.fromfile(out)
    assert read.to_dict() == {**cfg.to_dict(), **read.to_dict()}
    assert read.model.neck == cfg.model.neck
    assert read.model.backbone.norm_cfg.type is SyncBCN
    # and converted once more, nothing
    again = tmp_path / 'again.py'
    write_config(to_bcn(read, dict(type='SyncBCN'), ws=True), str(out), str(again))
    assert 'merge' not in again.read_text()
    # a checkpoint holds it as text, and is read by those who imported nothing
    script = tmp_path / 'build.py'
    script.write_text(
        'import sys\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import MODELS\n'
        'cfg = Config.fromstring(open(sys.argv[1]).read(), ".py")\n'
        'assert "bcn_mm" not in sys.modules\n'
        'model = MODELS.build(cfg.model)\n'
        'print(sum("BCN" in type(m).__name__ for m in model.modules()))'
    )
    dump = tmp_path / 'dumped.py'
    read.dump(dump)
    done = run(sys.executable, script, dump)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) > 20, done.stdout
    assert pickle.loads(pickle.dumps(read)).to_dict() == read.to_dict()


def test_names_that_cannot_be_imported(source, tmp_path):
    bad = source.rename(source.with_name('retina-net.py'))
    cfg = to_bcn(read_config(str(bad)))
    with pytest.raises(InputError, match='retina-net.*rename it'):
        write_config(cfg, str(bad), str(tmp_path / 'out.py'))
    assert not (tmp_path / 'out.py').exists()
