"""The Triton kernels as machine code, which needs no card."""

import pytest

pytest.importorskip('triton', minversion='3', reason='needs Triton 3 and its assembler')

from bcn_mm.ops.kernels import triton_report

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('card', triton_report.CARDS)
@pytest.mark.parametrize('name', triton_report.INPUTS)
def test_nothing_is_spilled(name, card):
    found = list(triton_report.rows((name,), (card,)))
    assert len(found) == 6
    for _, kernel, (registers, spills, shared) in found:
        assert not spills, kernel
        # two blocks of 256 threads, or four of 128, at the least
        assert registers <= 128, kernel
        assert shared <= 16 << 10, kernel


def test_the_report(capsys, monkeypatch):
    words = ['triton_report', '--cards', '80', '--inputs', 'pooled']
    monkeypatch.setattr('sys.argv', words)
    triton_report.main()
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == '| input | kernel | sm_80 |' and len(lines) == 6
    assert all(line.startswith('| pooled | `') for line in lines)
