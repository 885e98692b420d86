"""What a command line gives, and what is said about it."""

import argparse
import copy
import errno
import os
import warnings

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.model import PretrainedInit

import bcn_mm
from bcn_mm.convert import walk
from bcn_mm.engine.cli import (
    add_arguments,
    check_pretrained,
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


@pytest.mark.parametrize(
    'text, value',
    [
        ('my data/x.pth', 'my data/x.pth'),
        ("'my data/x.pth'", 'my data/x.pth'),
        ('x.pth', 'x.pth'),
        (' 3 ', 3),
        ('0.5', 0.5),
        ('None', None),
        ('1, 2', [1, 2]),
        ('(1, 2)', (1, 2)),
        ('[(1, 2), a b]', [(1, 2), 'ab']),
        ('', ''),
    ],
)
def test_values_of_options(text, value):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(['--cfg-options', f'a={text}'])
    assert args.cfg_options == dict(a=value)


def test_load_config(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('a = dict(b=1, c=[1, 2])')
    cfg = load_config(given(path, **{'a.b': 2}))
    assert cfg.a.b == 2 and cfg.work_dir == os.path.join('work_dirs', 'c')
    with pytest.raises(InputError, match='--cfg-options'):
        load_config(given(path, **{'a.c.7': 2}))
    with pytest.raises(InputError, match="c.py is of scope 'nowhere'"):
        load_config(given(path, default_scope='nowhere'))


def test_configs_of_packages():
    source = 'bcn_mm::quickstart/mask-rcnn_r18_bcn-ws_shapes.py'
    cfg = load_config(given(source))
    assert cfg.model == bcn_mm.get_config('mask-rcnn_r18_bcn-ws_shapes').model
    name = 'mask-rcnn_r18_bcn-ws_shapes'
    assert cfg.work_dir == os.path.join('work_dirs', name)
    # what a copy of it in the work directory is called
    assert os.path.basename(cfg.filename) == f'{name}.py'


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
    with pytest.raises(SystemExit), one_line_errors('c.py', only=InputError):
        raise OSError(errno.ENOSPC, 'No space left')
    assert 'error: config c.py: disk full: ' in capsys.readouterr().err
    with pytest.raises(KeyError), one_line_errors('c.py', only=InputError):
        raise KeyError('name')
    monkeypatch.setenv('BCN_MM_TRACEBACK', '1')
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError('name')


def test_warnings_come_where_all_goes_well(capsys):
    with pytest.warns(UserWarning, match='first'), one_line_errors():
        warnings.warn('first', stacklevel=1)
    with pytest.raises(SystemExit), one_line_errors():
        warnings.warn('second', stacklevel=1)
        raise InputError('wrong')
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize(
    'model, name',
    [
        (dict(pretrained='PATH'), 'model.pretrained'),
        (dict(a=dict(pretrained='PATH')), 'model.a.pretrained'),
        (dict(init_cfg=dict(type='Pretrained', checkpoint='PATH')), 'model.init_cfg'),
        (
            dict(a=dict(init_cfg=dict(type=PretrainedInit, checkpoint='PATH'))),
            'model.a.init_cfg',
        ),
        (
            dict(init_cfg=[dict(type='mmengine.Pretrained', checkpoint='PATH')]),
            'model.init_cfg',
        ),
    ],
)
def test_check_pretrained(model, name, tmp_path):
    """Wherever a config says it, and by a class, too."""

    def of(path):
        cfg = Config(dict(model=copy.deepcopy(model)))
        for _, node in walk(cfg.model):
            node.update({k: path for k, v in node.items() if v == 'PATH'})
        return cfg

    gone = str(tmp_path / 'gone.pth')
    with pytest.raises(InputError, match=f'^{name}: .*gone.pth.*{name}=None'):
        check_pretrained(of(gone))
    (tmp_path / 'gone.pth').write_text('no')
    with pytest.raises(InputError, match='no checkpoint|damaged'):
        check_pretrained(of(gone))
    check_pretrained(of('torchvision://resnet18'))
    check_pretrained(Config(dict(model=dict(pretrained=None, a=dict(pretrained=True)))))


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
