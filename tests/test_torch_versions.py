"""What versions of torch differ in, and that it is asked in one place."""

import re
import sys

import pytest
import torch
from conftest import ROOT, run

from bcn_mm.ops import _compat

# names of torch that came after 2.0, and their home here
NEWER = r'torch\.(compiler|export|accelerator|amp\.autocast_mode\.is)\b|custom_op|'
NEWER += (
    r'register_fake|torch\.is_autocast|_wrapped_call_impl|always_call|weights_only=True'
)


def test_versions_are_asked_in_one_place():
    found = {
        path.relative_to(ROOT / 'bcn_mm').as_posix()
        for path in (ROOT / 'bcn_mm').rglob('*.py')
        if '.mim' not in path.parts
        and re.search(
            NEWER, re.sub(r'"""(?s:.*?)"""|``.*?``|#.*', '', path.read_text())
        )
    }
    assert found == {
        'ops/_compat.py',
        '_compat.py',  # of the fork's own way to load
        'weights/unpickling.py',
        'deploy/onnx.py',  # of the exporter that needs it
    }


def test_older_torch_is_one_line():
    code = "import torch; torch.__version__ = '1.13.1+cu117'; import bcn_mm"
    done = run(sys.executable, '-c', code)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        'ImportError: bcn_mm needs torch 2.0 or later, but this is torch '
        '1.13.1+cu117; update it, with an mmcv that was built for the new one'
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_what_stands_in_is_the_same(dtype):
    """The rounding of ``addcmul(out=)``, where torch has it."""
    a, b, c = torch.randn(3, 2, 1000)
    out = torch.empty_like(a, dtype=dtype)
    assert _compat._add_and_cast(a, b, c, out=out) is out
    other = torch.empty_like(out)
    assert _compat.addcmul_into(a, b, c, out=other) is other
    assert out.equal(other)


@pytest.mark.parametrize('device_type', ['cpu', 'cuda'])
def test_autocast_is_known_by_device(device_type):
    assert not _compat.is_autocast_enabled(device_type)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert _compat.is_autocast_enabled(device_type) == (device_type == 'cpu')


def test_an_opaque_operator_is_one_to_compilers():
    double = _compat.opaque_operator(
        'bcn_mm_tests::double(Tensor x) -> Tensor', lambda x: x * 2, torch.empty_like
    )
    assert double(torch.ones(3)).equal(torch.full((3,), 2.0))
    assert double(torch.ones(3, device='meta')).shape == (3,)
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda x: double(x) + 1, backend=backend)
    assert compiled(torch.ones(3)).equal(torch.full((3,), 3.0))
    assert any('double' in str(target) for target in seen)
