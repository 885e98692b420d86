"""Thin configs, and how they are written."""

import pytest
from mmengine.config import Config
from support.stock_configs import RETINA

from bcn_mm.convert import difference, read_config, to_bcn, write_config


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('a = 1\n')
    cfg = to_bcn(read_config(RETINA))
    cfg.model.backbone.depth = object()  # cannot be written
    with pytest.raises(Exception):  # noqa: B017
        write_config(cfg, RETINA, str(path))
    assert path.read_text() == 'a = 1\n'
    assert list(tmp_path.iterdir()) == [path]


def test_both_behind_a_link(tmp_path):
    """As homes are: what is written may move with what it inherits from."""
    (tmp_path / 'disk/a').mkdir(parents=True)
    (tmp_path / 'home').symlink_to(tmp_path / 'disk')
    source = tmp_path / 'home/base.py'
    source.write_text(f"_base_ = '{RETINA}'\n")
    out = tmp_path / 'home/a/bcn.py'
    write_config(to_bcn(read_config(str(source))), str(source), str(out))
    assert "_base_ = '../base.py'" in out.read_text()


@pytest.mark.parametrize('behind', ['source', 'target'])
def test_folders_behind_links(behind, tmp_path):
    real, other = tmp_path / 'a/b/c', tmp_path / 'd'
    real.mkdir(parents=True)
    other.mkdir()
    (tmp_path / 'link').symlink_to(real)
    folders = [tmp_path / 'link', other]
    source, out = folders if behind == 'source' else reversed(folders)
    (source / 'base.py').write_text(f"_base_ = '{RETINA}'\n")
    source = str(source / 'base.py')
    cfg = to_bcn(read_config(source))
    write_config(cfg, source, str(out / 'bcn.py'))
    assert read_config(str(out / 'bcn.py')).to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    'base, new',
    [
        (dict(a=1, b=dict(c=1)), dict(a=1, b=dict(c=1))),
        (dict(a=1, b=dict(c=1, d=2)), dict(a=2, b=dict(d=2))),
        (dict(b=[1]), dict(b=dict(c=1))),
        (dict(b=None), dict(b=dict(c=1))),
        (dict(b=dict(c=1)), dict(b=None, e=dict(f=dict(g=1)))),
        (dict(b=[dict(c=1), dict(d=1)]), dict(b=[dict(c=1), dict(d=2)])),
        (dict(b=dict(c=dict(d=1))), dict(b=dict(c=dict(e=1), f=1))),
    ],
)
def test_a_difference_merged_gives_the_new(base, new):
    merged = Config._merge_a_into_b(difference(base, new), base)
    assert merged == new
