"""What the documents name is there: links, files, commands, names."""

import pytest
from conftest import ROOT
from support import documents

QUICK = [documents.broken_links, documents.missing_files, documents.unknown_names]


@pytest.mark.parametrize('check', QUICK, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    'path', documents.DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT))
)
def test_is_there(path, check):
    assert check(path, path.read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    'path', documents.DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands(path):
    assert documents.broken_commands(path, path.read_text()) == []


@pytest.mark.parametrize(
    'check, text, complaints',
    [
        ('broken_links', '[a](LICENSE) [b](#one)\n# One', []),
        ('broken_links', '[a](LICENCE)', ['LICENCE: no such file']),
        ('broken_links', '![a](docs/x.png)', ['docs/x.png: no such file']),
        ('broken_links', '[a](../x)', ['../x: no such file']),
        ('broken_links', '[a](<a b>)', ['a%20b: not safe in an URL']),
        ('broken_links', '[a](#two)\n# One', ['#two: no such heading']),
        (
            'broken_links',
            '[a](docs/index.md#no)',
            ['docs/index.md#no: no such heading'],
        ),
        ('missing_files', '`tools/train.py` `layers/bcn.py` `docs/_build/html`', []),
        ('missing_files', '`tools/rain.py`', ['tools/rain.py: no such file']),
        ('missing_files', '```\nx configs/*/x\n```', ['configs/*/x: no such file']),
        ('missing_files', '`layers/bn.py`', ['layers/bn.py: no such file']),
        ('unknown_names', '`bcn_mm.BCN.forward(x)` `bcn_mm.layers.levels`', []),
        ('unknown_names', '`bcn_mm.BN`', ['bcn_mm.BN: no such name']),
        (
            'unknown_names',
            '```python\nbcn_mm.layers.no.x\n```',
            ['bcn_mm.layers.no.x: no such name'],
        ),
    ],
)
def test_checks_complain(check, text, complaints):
    assert getattr(documents, check)(ROOT / 'README.md', text) == complaints


@pytest.mark.slow
@pytest.mark.parametrize(
    'line, complaints',
    [
        ('A=1 python tools/train.py X --resume  # --no', []),
        ('python tools/train.py X \\\n--cfg-options=a.b=1 --rsume', ['has no --rsume']),
        ('python tools/rain.py X', ['tools/rain.py: does not start']),
        ('python -m studies.no', ['-m studies.no: does not start']),
        ('bash tools/rain.sh X', ['tools/rain.sh: does not start']),
        ('bash tools/dist_train.sh X 8 --amp --amq', ['has no --amq']),
        ('bash tools/run_tests.sh -m gpu -j', ['has no -j']),
        ('torchrun --no tools/train.py X --launch pytorch', ['has no --launch']),
        ('cd work_dirs/a\npython ../../tools/train.py --no', ['has no --no']),
        ('pithon tools.py', ['tools.py: does not start']),
    ],
)
def test_commands_complain(line, complaints):
    found = documents.broken_commands(ROOT / 'README.md', f'```bash\n{line}\n```')
    assert len(found) == len(complaints)
    assert all(text.endswith(end) for text, end in zip(found, complaints))
