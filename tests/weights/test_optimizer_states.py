"""What a training is resumed with: an optimizer, and the state of exactly that one."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from bcn_mm.errors import InputError
from bcn_mm.weights.reading import check_optimizer

OPTIMIZERS = {
    'SGD': lambda *groups: torch.optim.SGD(groups, lr=0.1),
    'momentum': lambda *groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    'Adam': lambda *groups: torch.optim.Adam(groups, lr=0.1),
    'AdamW': lambda *groups: torch.optim.AdamW(groups, lr=0.1),
    'RMSprop': lambda *groups: torch.optim.RMSprop(groups, lr=0.1),
    'Adagrad': lambda *groups: torch.optim.Adagrad(groups, lr=0.1),
}


def groups_of(net, split):
    """The parameters in groups that end where the split says."""
    params = list(net.parameters())
    ends = [*split, len(params)]
    return [dict(params=params[a:b]) for a, b in zip([0, *ends], ends)]


def wrapped(kind):
    name, *split = kind
    if name == 'several':
        return OptimWrapperDict(**{k: wrapped(('SGD',)) for k in split})
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return OptimWrapper(OPTIMIZERS[name](*groups_of(net, split)))


def step(wrapper):
    for one in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
        for group in one.optimizer.param_groups:
            for p in group['params']:
                p.grad = torch.ones_like(p)
        one.optimizer.step()


def goes_on(wrapper, state):
    """Whether an optimizer takes a state, and steps from there."""
    try:
        wrapper.load_state_dict(copy.deepcopy(state))
        step(wrapper)
    except (ValueError, KeyError, AssertionError):
        return False
    return True


KINDS = [
    *((name,) for name in OPTIMIZERS),
    ('SGD', 1),
    ('SGD', 2),
    ('SGD', 1, 2),
    ('several', 'a', 'b'),
    ('several', 'a', 'c'),
]


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: '-'.join(map(str, kind)))
def test_check_optimizer(kind):
    """It lets pass exactly what the optimizer would go on from."""
    for other in KINDS:
        given = wrapped(other)
        step(given)
        state = given.state_dict()
        message = ''
        try:
            check_optimizer(wrapped(kind), dict(optimizer=state), 'a.pth')
        except InputError as e:
            message = str(e)
        assert (message == '') == goes_on(wrapped(kind), state), (other, message)
        assert message == '' or message.startswith('checkpoint a.pth cannot be resumed')


@pytest.mark.parametrize('state', [None, 1, [], {}, dict(param_groups=1)])
def test_no_state_of_an_optimizer(state):
    for kind in (('SGD',), ('several', 'a', 'b')):
        check_optimizer(wrapped(kind), {}, 'a.pth')
        with pytest.raises(InputError, match='a.pth cannot be resumed'):
            check_optimizer(wrapped(kind), dict(optimizer=state), 'a.pth')
