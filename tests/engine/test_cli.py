"""What a command line gives, and what is said about it."""

import argparse
import os

import pytest
from mmengine.config import ConfigDict

from bcn_mm.engine.cli import (
    add_arguments,
    forget_pretrained,
    load_config,
    one_line_errors,
)
from bcn_mm.errors import InputError


def given(path, **options):
    """What the tools' parsers make of a command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_arguments(parser)
    args = parser.parse_args([str(path)])
    args.cfg_options = options
    return args


def test_load_config(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('a = dict(b=1, c=[1, 2])')
    cfg = load_config(given(path, **{'a.b': 2}))
    assert cfg.a.b == 2 and cfg.work_dir == os.path.join('work_dirs', 'c')
    with pytest.raises(InputError, match='none.py does not exist'):
        load_config(given(tmp_path / 'none.py'))
    with pytest.raises(InputError, match='--cfg-options'):
        load_config(given(path, **{'a.c.7': 2}))
    path.write_text('a = dict(')
    with pytest.raises(InputError, match='c.py cannot be read.*SyntaxError'):
        load_config(given(path))


def test_one_line_errors(capsys, monkeypatch):
    for error, text in (
        (InputError('two\nlines'), 'error: two lines ('),
        (KeyError('name'), 'error: KeyError: name ('),
        (TypeError('bad'), 'error: TypeError: bad ('),
    ):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise error
        out = capsys.readouterr()
        assert stop.value.code == 1
        assert out.err.startswith(text) and out.err.count('\n') == 1
    monkeypatch.setenv('BCN_MM_TRACEBACK', '1')
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError('name')


def test_forget_pretrained():
    """Wherever a config keeps them, and nothing else."""
    load = dict(type='Pretrained', checkpoint='a.pth')
    other = dict(type='Kaiming', layer='Conv2d')
    model = ConfigDict(
        pretrained='b.pth',
        backbone=dict(depth=18, init_cfg=load, parts=[dict(init_cfg=load)]),
        neck=dict(init_cfg=[other, load]),
        head=dict(init_cfg=other),
    )
    forget_pretrained(model)
    assert model.to_dict() == dict(
        backbone=dict(depth=18, init_cfg=None, parts=[dict(init_cfg=None)]),
        neck=dict(init_cfg=[other]),
        head=dict(init_cfg=other),
    )
