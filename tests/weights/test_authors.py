"""The authors' checkpoints, converted whole, and back."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.models.backbones import ResNeXt
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS as SEG
from support import authors
from support.checkpoints import (
    assert_close,
    backbone,
    resnet18,
)
from torch import nn

from bcn_mm import BCN, WSConv2d
from bcn_mm.weights.authors import from_authors, to_authors

CONFIG = 'configs/deeplabv3/deeplabv3_r101-d16_bcn-ws_8xb2-33k_voc12aug-513x513.py'


def wrapped(state):
    """As the authors' training code saves it."""
    state = {f'module.{name}': value for name, value in state.items()}
    return dict(epoch=90, state_dict=state, optimizer=dict(state={}))


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# -- the authors' checkpoints -------------------------------------------------


@pytest.fixture(scope='module')
def rn50(tmp_path_factory):
    """A ResNet-50 of theirs, its file, a picture and the stages' outputs."""
    torch.manual_seed(1)
    net = authors.randomize(authors.Backbone(50, classes=10).double())
    path = tmp_path_factory.mktemp('authors') / 'rn50_bcn_ws.pth'
    torch.save(wrapped(net.state_dict()), path)
    x = torch.randn(2, 3, 64, 48, dtype=torch.double)
    with torch.no_grad():
        return net.state_dict(), path, x, net(x)


@pytest.mark.slow
def test_resnet50(rn50, tmp_path):
    """Converted, in mmdet's ResNet."""
    state, _, x, want = rn50
    made = from_authors(state, 'resnet50')
    path = tmp_path / 'converted.pth'
    torch.save(dict(meta=made.meta, state_dict=made.state), path)
    net = backbone(depth=50).double()
    net.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    net.init_weights()
    with torch.no_grad():
        assert_close(net(x), want)
    assert made.meta['ws_dialect'] == 'var'
    assert from_authors(state).meta == made.meta
    # the file knows its dialect
    with pytest.raises(RuntimeError, match="conv1: .*'var'.*'std'"):
        backbone(depth=50, dialect='std', checkpoint=path)
    with pytest.raises(RuntimeError, match="conv1: .*'var'.*Conv2d with none"):
        backbone(depth=50, dialect=None, checkpoint=path)


@pytest.mark.slow
def test_authors_file_as_init_cfg(rn50, log):
    _, path, x, want = rn50
    net = backbone(depth=50).double()
    net.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    net.init_weights()
    with torch.no_grad():
        assert_close(net(x), want)
    assert sum("authors' layout" in line for line in log) == 1
    assert sum('does not say its dialect' in line for line in log) == 1
    (left,) = [line for line in log if 'unexpected' in line]
    assert 'fc.weight, fc.bias' in left and 'missing' not in left


@pytest.mark.slow
def test_resnext50():
    net = authors.Backbone(50, groups=32, base=4, classes=10, inner='bn')
    net = authors.randomize(net.double())
    made = from_authors(wrapped(net.state_dict())['state_dict'])
    assert made.meta['arch'] == 'resnext50_32x4d'
    ours = backbone(ResNeXt, depth=50, groups=32, base_width=4).double()
    missing, unexpected = ours.load_state_dict(made.state, strict=False)
    assert not missing and unexpected == ['fc.weight', 'fc.bias']
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        assert_close(ours(x), net(x))


def mmseg_model(**edits):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({f'model.{k}': v for k, v in edits.items()})
    with DefaultScope.overwrite_default_scope('mmseg'):
        return SEG.build(cfg.model).eval()


@pytest.mark.slow
def test_deeplab():
    """With the configuration for it, up to the logits."""
    net = authors.randomize(authors.DeepLab(101).double())
    x = torch.randn(1, 3, 97, 65, dtype=torch.double)
    with torch.no_grad():
        want = net(x)
    made = from_authors(net.state_dict())
    assert made.meta['arch'] == 'deeplabv3_resnet101'
    assert made.meta['ws_dialect'] == 'std'
    assert any('aspp.conv2' in note for note in made.notes)
    del net
    # as docs/guides/weights.md says; the recipe's own is that of their ImageNet model
    parts = 'backbone', 'decode_head'
    std = {f'{part}.conv_cfg.dialect': 'std' for part in parts}
    ours = mmseg_model(**std).double()
    ours.load_state_dict(made.state)
    with torch.no_grad():
        logits = ours.encode_decode(x, [dict(img_shape=x.shape[2:])])
        assert_close([ours.decode_head(ours.backbone(x)), logits], want)


@pytest.mark.parametrize('dialect', ['std', 'var', 'biased_var', 'none'])
def test_deeplab_joining_convolution(dialect):
    """1x1 in the centre of 3x3, in every dialect."""
    plain = dialect == 'none'
    head = authors.Head(512, 5, 'std' if plain else dialect, 'pbn').double()
    if plain:
        for m in head.modules():
            if isinstance(m, authors.Conv):
                m.forward = nn.Conv2d.forward.__get__(m)
    authors.randomize(head)
    # weights so small that the eps of the standardization counts
    head.conv2.weight.data.mul_(0.001)
    net = authors.DeepLab(18, 5).double()
    net.aspp.load_state_dict(head.state_dict())
    made = from_authors(net.state_dict(), dialect=dialect)
    conv = dict(type='WSConv2d', dialect=dialect)
    model = mmseg_model(
        **{
            'backbone.depth': 18,
            'decode_head.in_channels': 512,
            'decode_head.num_classes': 5,
            'decode_head.conv_cfg': None if plain else conv,
            'backbone.conv_cfg': None if plain else conv,
        }
    ).double()
    model.load_state_dict(made.state)
    x = torch.randn(2, 512, 7, 9, dtype=torch.double)
    with torch.no_grad():
        assert_close([model.decode_head([None] * 3 + [x])], [head(x)], 1e-9)


# -- and back -----------------------------------------------------------------


@pytest.mark.parametrize('inner', ['pbn', 'bn'])
def test_round_trip_of_a_backbone(inner):
    state = resnet18().state_dict()
    theirs = to_authors(state, inner)
    twin = authors.Backbone(18, inner=inner)
    twin.load_state_dict(theirs.state)
    assert_same(from_authors(theirs.state, dialect='var').state, state)
    assert theirs.meta['ws_dialect'] == 'var'
    state = authors.randomize(twin).state_dict()
    assert_same(
        to_authors(from_authors(state, dialect='std').state, inner).state, state
    )


def test_convolutions_without_standardization_are_named():
    net = nn.Sequential(
        *(WSConv2d(3, 8, 3, bias=False), BCN(8)),
        *(nn.Conv2d(8, 8, 3, bias=False), BCN(8)),
    )
    assert not any('have none' in n for n in to_authors(net[:2].state_dict()).notes)
    theirs = to_authors(net.state_dict())
    assert any(n.startswith('2 and 0 other convolutions') for n in theirs.notes)


def test_round_trip_of_a_deeplab():
    model = mmseg_model(
        **{
            'backbone.depth': 18,
            'decode_head.in_channels': 512,
        }
    )
    state = authors.randomize(model).state_dict()
    theirs = to_authors(state)
    assert any('3x3' in note for note in theirs.notes)
    again = from_authors(theirs.state)
    assert_same(again.state, state)
    assert from_authors(theirs.state, 'deeplabv3_resnet18').meta == again.meta
    state['auxiliary_head.conv_seg.weight'] = torch.zeros(1)
    (note,) = [n for n in to_authors(state).notes if 'left out' in n]
    assert note.startswith('auxiliary_head.conv_seg.weight and 0 others')
    wide = dict(state)
    wide['decode_head.bottleneck.conv.weight'] = torch.zeros(512, 2560, 3, 3)
    with pytest.raises(ValueError, match=r'conv2.weight has shape \(512, 25'):
        to_authors(wide)
    state['decode_head.c1_bottleneck.conv.weight'] = torch.zeros(1)
    with pytest.raises(ValueError, match='c1_bottleneck.conv.weight: the au'):
        to_authors(state)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(['conv', 'lateral.bn', 'bn', 'x.norm', 'pbn']),
            st.integers(1, 4),
            st.sampled_from([1, 2, 32]),
            st.sampled_from([torch.half, torch.float, torch.double]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(['pbn', 'bn']),
)
def test_round_trip_of_any_model(layers, inner):
    """In OpenMMLab's names, whatever the layers are called."""
    state = {'backbone.conv.weight': torch.randn(2, 3, 1, 1)}
    for i, (name, size, groups, dtype) in enumerate(layers):
        layer = BCN(2 * size * groups, groups).to(dtype)
        for key, value in authors.randomize(layer).state_dict().items():
            state[f'neck.{i}.{name}.{key}'] = value
        state[f'neck.{i}.conv1d.weight'] = torch.randn(3, 2, 1)
        bn = nn.BatchNorm2d(4).state_dict()  # a norm that was not replaced
        state.update((f'neck.{i}.other.bn.{k}', v) for k, v in bn.items())
    before = copy.deepcopy(state)
    theirs = to_authors(state, inner).state
    assert not any('batch_weight' in name for name in theirs)
    assert_same(state, before)
    before = copy.deepcopy(theirs)
    assert_same(from_authors(theirs).state, state)
    assert_same(theirs, before)


def test_metadata_survives():
    """What is written into it, and what is taken from a part of it."""
    made = from_authors(authors.DeepLab(18).state_dict())
    marks = {k for k, v in made.state._metadata.items() if 'ws_dialect' in v}
    model = mmseg_model(
        **{
            'backbone.depth': 18,
            'decode_head.in_channels': 512,
        }
    )
    assert marks == {
        name for name, m in model.named_modules() if isinstance(m, WSConv2d)
    }
    assert model.state_dict().keys() == made.state.keys()


def test_rates_are_left_out_and_said():
    state = authors.Backbone(18, inner='bn', classes=3).state_dict()
    for name in ('bn1', 'layer1.0.bn1'):
        state[f'{name}.bn.estbn_moving_speed'] = torch.zeros(1)
    made = from_authors(state)
    (note,) = [n for n in made.notes if 'rate' in n]
    assert note.startswith('bn1.bn.estbn_moving_speed and 1 others')
    assert not any('speed' in name for name in made.state)
    for name in [k for k in state if 'tracked' in k]:
        del state[name]
    again = from_authors(state).state
    assert_same({name: again[name] for name in made.state}, made.state)


def test_conversions_leave_their_input():
    state = authors.Backbone(18).state_dict()
    before = copy.deepcopy(state)
    metadata = copy.deepcopy(state._metadata)
    from_authors(state, dialect='var')
    assert_same(state, before)
    assert state._metadata == metadata
