"""Tensors are known again by identity."""

import pytest
import torch

from bcn_mm._tracing import TensorTracer


class Seen(TensorTracer):
    """Keeps the names of the functions that came by."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_only_the_tensor_itself_is_known():
    tracer, x = TensorTracer(), torch.ones(3)
    tracer.follow(x, 'x')
    assert tracer.label_of(x) == 'x'
    assert tracer.label_of(x, unwritten=True) == 'x'
    for other in (x.clone(), x.view(3), x.detach(), torch.ones(3), 1, None):
        assert tracer.label_of(other) is None


def test_a_tensor_with_the_id_of_another_one_is_unknown():
    tracer = TensorTracer()
    ids = set()
    for _ in range(100):
        x = torch.ones(3)
        assert tracer.label_of(x) is None
        tracer.follow(x, 'x')
        ids.add(id(x))
        del x
    assert len(ids) < 100  # they did come again


def test_tensors_are_not_kept_alive():
    tracer, x, y = TensorTracer(), torch.ones(3), torch.ones(3)
    tracer.follow(x, 'x')
    tracer.follow(y, 'y')
    assert sorted(tracer.living()) == ['x', 'y']
    del x
    assert list(tracer.living()) == ['y']


@pytest.mark.parametrize(
    'write',
    [
        lambda x: x.add_(1),
        lambda x: x.view(-1).zero_(),
        lambda x: x.__setitem__(0, 5),
        lambda x: torch.relu_(x),
    ],
)
def test_what_was_written_into_is_another_value(write):
    tracer, x = TensorTracer(), torch.ones(3)
    tracer.follow(x, 'x')
    write(x)
    assert tracer.label_of(x) == 'x'
    assert tracer.label_of(x, unwritten=True) is None
    tracer.follow(x, 'x again')
    assert tracer.label_of(x, unwritten=True) == 'x again'


def test_inference_tensors_count_no_versions():
    tracer = TensorTracer()
    with torch.inference_mode():
        x = torch.ones(3)
        tracer.follow(x, 'x')
        assert tracer.label_of(x) == 'x'
        assert tracer.label_of(x, unwritten=True) is None


def test_following_is_no_call():
    tracer = Seen()
    x = torch.ones(3)
    with tracer:
        tracer.follow(x, 'x')
        assert tracer.label_of(x) == 'x'
        assert tracer.names == []
        x.exp().log()
    assert tracer.names == ['exp', 'log']
    x.exp()
    assert tracer.names == ['exp', 'log']
