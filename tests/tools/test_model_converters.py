"""tools/model_converters, most of it in this process."""

import importlib.util
import re
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT, run
from mmdet.models.backbones import ResNet
from support import authors
from support.checkpoints import (
    Evil,
    drop,
    fill,
    instead,
    put,
    rename,
    shape,
    small,
)
from torch import nn

from bcn_mm import BCN
from bcn_mm.weights.reading import read_checkpoint

SCRIPT = ROOT / 'tools' / 'model_converters' / 'authors_to_mm.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('authors_to_mm', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_of(net):
    return small(authors.randomize(net).state_dict())


@pytest.fixture(scope='module')
def authors18():
    """A ResNet-18 in the authors' layout."""
    return state_of(authors.Backbone(18, classes=10))


@pytest.fixture(scope='module')
def mm18():
    net = ResNet(18, norm_cfg=dict(type='BCN'), norm_eval=False)
    return state_of(net)


def test_convert(tool, authors18, tmp_path, capsys):
    source, target = tmp_path / 'a.pth', tmp_path / 'new' / 'b.pth'
    torch.save(dict(epoch=3, state_dict=authors18), source)
    tool.main([str(source), str(target), '--arch', 'resnet18'])
    out = capsys.readouterr().out
    assert f'Wrote {target}' in out
    assert '20 convolutions and 20 norms mapped' in out
    assert 'arch=resnet18, ws_dialect=var, num_groups=32' in out
    made = read_checkpoint(str(target))
    assert made['meta']['ws_dialect'] == 'var'
    assert made['state_dict']._metadata['conv1']['ws_dialect'] == 'var'
    back = tmp_path / 'c.pth'
    tool.main([str(target), str(back), '--reverse'])
    again = read_checkpoint(str(back))['state_dict']
    assert all(torch.equal(again[k], authors18[k]) for k in authors18)
    assert list(again) == list(authors18)
    tool.main([str(source), str(target), '--dialect', 'none'])  # replaced
    assert read_checkpoint(str(target))['meta']['ws_dialect'] == 'none'
    assert not list(tmp_path.rglob('*.part'))


@pytest.mark.slow
def test_command_line(tmp_path):
    done = run(sys.executable, SCRIPT, tmp_path / 'c.pth', tmp_path / 'd.pth')
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert len(re.findall('^error: .*c.pth does not', done.stdout, re.M)) == 1


def test_help(tool, capsys):
    with pytest.raises(SystemExit, match='0'):
        tool.main(['--help'])
    assert 'usage' in capsys.readouterr().out


# -- malformed: name -> (change or arguments, message) -------------------------


BN1 = 'bn1.pbn.running_mean'
DEEP = 'layer3.1.conv2.weight'
BAD_STATES = {
    # numbers
    'NaN': (put('conv1.weight', fill(float('nan'))), 'conv1.weight holds NaN'),
    'NaN, first of two': (
        lambda s: (
            put('fc.bias', fill(float('nan')))(s),
            put(DEEP, fill(float('nan')))(s),
        ),
        f'{DEEP} holds NaN',
    ),
    'infinity': (put('fc.bias', fill(float('inf'))), 'fc.bias holds infin'),
    'variance': (
        put('layer2.0.bn2.pbn.running_var', fill(-1)),
        'layer2.0.bn2.pbn.running_var holds a negative variance',
    ),
    'integers': (put(DEEP, lambda v: v.long()), f'{DEEP} holds torch.int64'),
    'complex': (
        put(DEEP, lambda v: v.to(torch.cfloat)),
        f'{DEEP} holds torch.complex64',
    ),
    'text': (put(DEEP, 'weights'), f'{DEEP} is no tensor but str'),
    'nothing': (put(DEEP, None), f'{DEEP} is no tensor but NoneType'),
    'nested': (put('model', {}), 'model is no tensor but dict'),
    'no name': (put(7, torch.ones(1)), '7 is no name of a tensor'),
    'empty': (lambda s: s.clear(), 'the state dict is empty'),
    # names
    'missing convolution': (drop(DEEP), f'{DEEP} of resnet18 is missing'),
    'missing first': (drop('conv1.weight'), 'conv1.weight of resnet18 is mis'),
    'missing channel stage': (
        drop('layer1.1.bn2.bias'),
        'layer1.1.bn2.bias of resnet18 is missing',
    ),
    'missing batch stage': (
        drop('layer1.1.bn2.pbn.weight'),
        'layer1.1.bn2.pbn.weight of resnet18 is missing',
    ),
    'missing estimate': (drop(BN1), f'{BN1} of resnet18 is missing'),
    'missing classifier bias': (drop('fc.bias'), 'fc.bias of resnet18 is mis'),
    'renamed convolution': (
        rename('layer1.0.conv2', 'layer1.0.conv_2'),
        'layer1.0.conv2.weight of resnet18 is missing; not of resnet18: '
        'layer1.0.conv_2.weight',
    ),
    'renamed norms': (
        rename('^bn1.', 'norm1.'),
        'bn1.weight of resnet18 is missing; not of resnet18: norm1.weight',
    ),
    'renamed inner norm': (
        rename('layer4.1.bn2.pbn', 'layer4.1.bn2.bn'),
        'layer4.1.bn2.pbn.weight of resnet18 is missing; not of resnet18: '
        'layer4.1.bn2.bn.weight',
    ),
    'renamed inner norms': (
        rename('pbn', 'norm'),
        "bn1.norm.running_mean: this is BatchNorm's",
    ),
    'no estimates': (
        lambda s: drop(*[k for k in s if 'running' in k])(s),
        'bn1.pbn.running_mean is missing',
    ),
    'leftover': (put('swap', torch.ones(1)), 'swap is not of resnet18'),
    'half in module': (
        rename('^fc', 'module.fc'),
        'conv1.weight is outside of `module.`, where others are',
    ),
    'prefix': (rename('^', 'net.'), 'net.conv1.weight: blocks per stage'),
    'block too many': (
        rename('layer4.1', 'layer4.2'),
        'layer4.1.conv1.weight of resnet18 is missing',
    ),
    'stage missing': (
        lambda s: drop(*[k for k in s if k.startswith('layer4')])(s),
        'conv1.weight: blocks per stage are 2, 2, 2, 0',
    ),
    'deep stem': (
        rename('^conv1.weight', 'conv1.0.weight'),
        'conv1.0.weight: .*`beta`',
    ),
    # shapes
    'shape': (
        put(DEEP, shape(256, 256, 1, 1)),
        rf'{DEEP} has shape \(256, 256, 1, 1\), in resnet18 it is '
        r'\(256, 256, 3, 3\)',
    ),
    'scalar': (put(DEEP, shape()), rf'{DEEP} has shape \(\),'),
    'estimate': (put(BN1, shape(32)), rf'{BN1} has shape \(32,'),
    'groups': (
        put('layer1.0.bn1.weight', shape(1, 16, 1)),
        r'layer1.0.bn1.weight has shape \(1, 16, 1\)',
    ),
    'no divisor': (
        put('bn1.weight', shape(1, 7, 1)),
        'bn1.weight: 7 groups do not divide 64 channels',
    ),
    'flat groups': (
        put('bn1.weight', shape(32, 1, 2)),
        r'bn1.weight has shape \(32, 1, 2\) where \(1, groups, 1\) belongs',
    ),
    'per channel': (
        put('layer1.0.bn1.bias', shape(64)),
        r'layer1.0.bn1.bias has shape \(64,\), in resnet18 it is \(1, 32, 1',
    ),
    'classes': (put('fc.bias', shape(11)), r'fc.bias has shape \(11,\)'),
    'classifier': (put('fc.weight', shape(10, 2048)), 'fc.weight has shape'),
    'scalar classifier': (put('fc.weight', shape()), 'fc.weight has shape'),
    # layouts
    'BatchNorm': (
        instead(lambda: small(ResNet(18).state_dict())),
        "bn1.running_mean: this is BatchNorm's layout, which a BCN model",
    ),
    'GroupNorm': (
        instead(
            lambda: small(
                ResNet(18, norm_cfg=dict(type='GN', num_groups=32)).state_dict()
            )
        ),
        "gn1.weight: this is GroupNorm's layout",
    ),
    'own': (
        instead(lambda: small(ResNet(18, norm_cfg=dict(type='BCN')).state_dict())),
        "bn1.batch_weight: this is bcn_mm's layout already",
    ),
    'no norms': (
        instead(lambda: nn.Conv2d(2, 3, 1).state_dict()),
        'weight: there are no norms',
    ),
    'no classifier': (
        drop('fc.weight', 'fc.bias'),
        'there is neither .* say the dialect',
    ),
}
BAD_ARGUMENTS = {
    'arch': (['--arch', 'resnet50'], 'layer1.0.conv1.weight has shape'),
    'unknown arch': (['--arch', 'vgg'], "unknown architecture 'vgg'; choose"),
    'unknown depth': (['--arch', 'resnet19'], "unknown architecture 'resnet1"),
    'deeplab': (
        ['--arch', 'deeplabv3_resnet18'],
        'aspp.aspp1.weight of deeplabv3_resnet18 is missing; not of '
        'deeplabv3_resnet18: fc.weight',
    ),
    'dialect': (['--dialect', 'timm'], "unknown weight stand.* 'timm'"),
    'reverse arch': (['--reverse', '--arch', 'resnet18'], 'do not go with'),
    'reverse dialect': (['--reverse', '--dialect', 'var'], 'do not go with'),
    'reverse': (['--reverse'], 'conv1.weight: there is no BCN in this state'),
}
BAD_REVERSE = {
    'missing': (drop('bn1.batch_bias'), 'bn1.batch_bias is missing'),
    'NaN': (put('bn1.bias', fill(float('nan'))), 'bn1.bias holds NaN'),
    'levels': (
        put('bn1.running_mean', shape(5, 64)),
        r'bn1.running_mean has shape \(5, 64\): .* one estimate per channel',
    ),
}


def assert_fails(tool, capsys, arguments, message):
    """One line, exit status 1."""
    with pytest.raises(SystemExit) as end:
        tool.main([str(word) for word in arguments])
    assert end.value.code == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith('error: ') and 'Traceback' not in shown.out
    assert re.search(message, line), line
    return line


def assert_refuses(tool, capsys, tmp_path, arguments, message, target='b.pth'):
    line = assert_fails(
        tool, capsys, [tmp_path / 'a.pth', tmp_path / target, *arguments], message
    )
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']
    return line


@pytest.mark.parametrize('change, message', BAD_STATES.values(), ids=BAD_STATES)
def test_malformed(change, message, tool, authors18, tmp_path, capsys):
    state = authors18.copy()
    change(state)
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    line = assert_refuses(tool, capsys, tmp_path, [], f'a.pth: ({message})')
    assert len(line) < 300


@pytest.mark.parametrize(
    'arguments, message', BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_bad_arguments(arguments, message, tool, authors18, tmp_path, capsys):
    torch.save(authors18, tmp_path / 'a.pth')
    assert_refuses(tool, capsys, tmp_path, arguments, message)


@pytest.mark.parametrize('change, message', BAD_REVERSE.values(), ids=BAD_REVERSE)
def test_malformed_reverse(change, message, tool, mm18, tmp_path, capsys):
    state = mm18.copy()
    change(state)
    torch.save(state, tmp_path / 'a.pth')
    assert_refuses(tool, capsys, tmp_path, ['--reverse'], message)


def test_bad_inner(tool, mm18, tmp_path, capsys):
    torch.save(mm18, tmp_path / 'a.pth')
    arguments = ['--reverse', '--inner', 'sbn']
    assert_refuses(tool, capsys, tmp_path, arguments, "but got 'sbn'")


BAD_FILES = {
    'empty': (lambda data: b'', 'truncated or no checkpoint'),
    'text': (lambda data: b'<html>404</html>', 'damaged|no checkpoint'),
    'half': (lambda data: data[: len(data) // 2], 'truncated or no check'),
    'end': (lambda data: data[:-100], 'truncated or no checkpoint'),
    'start': (lambda data: data[100:], 'truncated|damaged'),
}


@pytest.mark.parametrize('cut, message', BAD_FILES.values(), ids=BAD_FILES)
def test_damaged_file(cut, message, tool, authors18, tmp_path, capsys):
    path = tmp_path / 'a.pth'
    torch.save(authors18, path)
    path.write_bytes(cut(path.read_bytes()))
    assert_refuses(tool, capsys, tmp_path, [], f'a.pth is.*({message})')


BAD_CONTENTS = {
    'code': (dict(state_dict={}, extra=Evil(print, 'harm')), 'not loaded'),
    'code in the state': (
        dict(state_dict={'conv1.weight': Evil(eval, '1')}),
        'not loaded',
    ),
    'module': (nn.Conv2d(2, 3, 1), 'not loaded'),
    'list': ([torch.ones(2)], 'holds no state dict but a list'),
    'tensor': (torch.ones(2), 'holds no state dict but a Tensor'),
    'state is a list': (dict(state_dict=[1]), 'its state_dict is a list'),
    'state is nothing': (dict(state_dict=None), 'its state_dict is a NoneTy'),
}


@pytest.mark.parametrize('value, message', BAD_CONTENTS.values(), ids=BAD_CONTENTS)
def test_other_contents(value, message, tool, tmp_path, capsys):
    torch.save(value, tmp_path / 'a.pth')
    assert_refuses(tool, capsys, tmp_path, [], f'a.pth.*{message}')


def test_bad_paths(tool, authors18, tmp_path, capsys):
    path = tmp_path / 'a.pth'
    assert_fails(tool, capsys, [path, tmp_path / 'b'], 'a.pth does not exist')
    assert_fails(tool, capsys, [tmp_path, tmp_path / 'b'], 'is a folder')
    torch.save(authors18, path)
    data = path.read_bytes()
    assert_refuses(tool, capsys, tmp_path, [], 'another file', target='a.pth')
    assert_refuses(tool, capsys, tmp_path, [], 'is a folder', target='')
    assert_fails(tool, capsys, [path, path / 'b.pth'], 'a.pth')
    assert path.read_bytes() == data


def test_a_failure_while_writing_leaves_what_was(
    tool, authors18, tmp_path, capsys, monkeypatch
):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(authors18, source)
    target.write_text('before')

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tool.torch, 'save', full)
    assert_fails(tool, capsys, [source, target], 'No space left')
    assert target.read_text() == 'before'
    assert {p.name for p in tmp_path.iterdir()} == {'a.pth', 'b.pth'}


def test_generic_names(tool, tmp_path, capsys):
    """A norm of a model in OpenMMLab's names, of which one entry is off."""
    net = nn.ModuleDict(
        {
            'backbone': nn.ModuleDict({'conv': nn.Conv2d(3, 64, 1)}),
            'neck': nn.Sequential(authors.Norm(64, 'bn')),
            'late': authors.Norm(64, 'bn'),
        }
    )
    state = OrderedDict(net.state_dict())
    path, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(state, path)
    tool.main([str(path), str(target)])
    made = torch.load(target)
    BCN(64).load_state_dict(
        {k[7:]: v for k, v in made['state_dict'].items() if k[:4] == 'neck'}
    )
    assert made['meta']['ws_dialect'] == 'std'
    target.unlink()
    capsys.readouterr()
    for name, value, message in (
        ('neck.0.bn.running_var', torch.ones(32), 'it should have'),
        ('late.bias', torch.ones(1, 8, 1), 'it should have'),
        ('late.bn.weight', None, 'is missing'),
    ):
        broken = state.copy()
        broken[name] = value
        if value is None:
            del broken[name]
        torch.save(broken, path)
        assert_refuses(tool, capsys, tmp_path, [], f'{name} .*{message}')
