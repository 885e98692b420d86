import pytest
import torch

from bcn_mm.ops.kernels import BACKENDS, using


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Have one backend after the other make all passes."""
    if not BACKENDS[request.param].serves(torch.empty(1, 1)):
        pytest.skip(f'{request.param} does not serve the CPU')
    with using(request.param):
        yield request.param
