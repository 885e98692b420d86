"""Who makes the passes: what is best, or what was asked for."""

import pytest
import torch

from bcn_mm.ops.kernels import BACKENDS, eager, kernels_for, native, using


def test_what_is_chosen():
    x = torch.randn(1, 4, 2, 2)
    assert type(kernels_for(x)) is native.Native
    assert type(kernels_for(x.to('meta'))) is eager.Eager
    with using('eager'):
        assert type(kernels_for(x)) is eager.Eager
    with using('native'):
        assert type(kernels_for(x)) is native.Native
        with pytest.raises(RuntimeError, match='native does not serve.*meta'):
            kernels_for(x.to('meta'))
    with pytest.raises(ValueError, match=f"auto, {', '.join(BACKENDS)}, but is 'x'"):
        using('x').__enter__()
    assert type(kernels_for(x)) is native.Native
