"""Reading checkpoints: data alone, whole, and of the right model."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from support.checkpoints import Evil, save
from torch import nn

from bcn_mm import BCN, WSConv2d
from bcn_mm.errors import DialectError, InputError
from bcn_mm.weights import unpickling
from bcn_mm.weights.reading import check_match, read_checkpoint

# torch's own way to read weights only, and the one for a torch before 2.6
ROUTES = [unpickling.TELLS, False] if unpickling.TELLS else [False]


@pytest.fixture(autouse=True, params=ROUTES, ids=['torch', 'ours'][-len(ROUTES) :])
def _route(request, monkeypatch):
    monkeypatch.setattr(unpickling, 'TELLS', request.param)


def test_mmengine_checkpoints_load_weights_only(tmp_path):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    state = dict(
        state_dict=BCN(4, 2).state_dict(),
        message_hub=dict(
            log_scalars=collections.OrderedDict(loss=history),
            runtime_info=dict(lr=np.float64(0.1), step=np.int64(3)),
            array=np.arange(3.0),
        ),
        param_schedulers=[dict(milestones=collections.Counter([8, 11]))],
    )
    if unpickling.TELLS:
        with torch.serialization.safe_globals([HistoryBuffer, np.ndarray]):
            pass  # the fork of mmengine does so, and none of them is left
    loaded = read_checkpoint(save(tmp_path / 'a.pth', state))
    assert loaded['param_schedulers'][0]['milestones'] == {8: 1, 11: 1}
    hub = loaded['message_hub']
    assert hub['log_scalars']['loss'].mean() == 1.5
    assert hub['runtime_info']['step'] == 3
    assert (hub['array'] == np.arange(3.0)).all()


@pytest.mark.parametrize(
    'value',
    [
        Evil(os.system, 'touch harmed'),
        Evil(eval, '1'),
        Evil(getattr, collections.OrderedDict, 'update'),
        Evil(getattr, HistoryBuffer, '__init__'),
        Evil(getattr, np.ndarray, 'tofile'),
        Evil(getattr, torch.Tensor, 'numpy'),
    ],
)
def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    path = save('evil.pth', dict(state_dict={}, extra=value))
    with pytest.raises(InputError, match='evil.pth.*was not loaded'):
        read_checkpoint(path)
    assert not (tmp_path / 'harmed').exists()


def test_loading_without_a_word_is_of_data_alone(tmp_path, monkeypatch):
    """As torch's own is since 2.6; who wants all says so, as there."""
    monkeypatch.chdir(tmp_path)
    load = unpickling.as_data(torch.load)
    path = save('evil.pth', dict(extra=Evil(os.system, 'touch harmed')))
    for more in ({}, dict(map_location='cpu', weights_only=True)):
        with pytest.raises(pickle.UnpicklingError, match=r'GLOBAL (posix|nt)\.system'):
            load(path, **more)
    assert not (tmp_path / 'harmed').exists()
    load(path, weights_only=False)
    assert (tmp_path / 'harmed').exists()


@pytest.mark.parametrize('legacy', [False, True])
def test_tensors_come_as_they_were(tmp_path, legacy):
    kinds = (torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
    state = {str(kind): torch.ones(3, dtype=kind) for kind in kinds}
    view = torch.arange(12.0).view(3, 4)
    state.update(view=view.t()[1:], parameter=nn.Parameter(view), dtype=torch.half)
    torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy)
    loaded = read_checkpoint(str(tmp_path / 'a.pth'))['state_dict']
    assert loaded['dtype'] is torch.half
    assert isinstance(loaded['parameter'], nn.Parameter)
    for name, value in state.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
            assert loaded[name].stride() == value.stride()


@pytest.mark.parametrize('keep', [0, 10, 400, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / 'a.pth'
    save(path, dict(state_dict=BCN(64).state_dict()))
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep > 1 else int(keep * len(data))])
    with pytest.raises(InputError, match='a.pth is (truncated|damaged)'):
        read_checkpoint(str(path))


def test_other_files(tmp_path):
    with pytest.raises(InputError, match='none.pth does not exist'):
        read_checkpoint(str(tmp_path / 'none.pth'))
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(InputError, match='text.pth'):
        read_checkpoint(str(tmp_path / 'text.pth'))
    with pytest.raises(InputError, match='no state dict but a list'):
        read_checkpoint(save(tmp_path / 'list.pth', [1]))
    with pytest.raises(InputError):
        (tmp_path / 'pickle.pth').write_bytes(pickle.dumps(Evil(os.getcwd)))
        read_checkpoint(str(tmp_path / 'pickle.pth'))
    state = BCN(4, 2).state_dict()
    assert (
        read_checkpoint(save(tmp_path / 'bare.pth', state))['state_dict'].keys()
        == state.keys()
    )


def test_check_match():
    def net(*widths):
        return nn.Sequential(*(nn.Linear(w, 4) for w in widths))

    def given(*widths):
        return dict(state_dict=net(*widths).state_dict())

    check_match(net(1, 2), given(1, 2), 'x')
    module = {f'module.{k}': v for k, v in net(1).state_dict().items()}
    check_match(net(1), dict(state_dict=module), 'x')
    theirs = nn.DataParallel(nn.Sequential(WSConv2d(2, 3, 3, dialect='var')))
    own = nn.Sequential(WSConv2d(2, 3, 3))
    with pytest.raises(DialectError, match="0: .*'var'.*'std'"):
        check_match(own, dict(state_dict=theirs.state_dict()), 'x')
    check_match(theirs.module, dict(state_dict=theirs.state_dict()), 'x')
    for widths, message in (
        ((1, 3), r"3 of the model's 4 .* 4 in the file.*1.weight .*\(4, 2\)"),
        ((1,), r'2 of .* 4 .* 2 in the file.*1.weight .*file: absent'),
        ((1, 2, 5), r'4 of .* 4 .* 6 in the file.*2.weight .*model: absent'),
    ):
        with pytest.raises(InputError, match=message):
            check_match(net(1, 2), given(*widths), 'x')
