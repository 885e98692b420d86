"""The examples of the docstrings are right."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import bcn_mm


def modules():
    yield bcn_mm
    for info in pkgutil.walk_packages(bcn_mm.__path__, 'bcn_mm.'):
        yield importlib.import_module(info.name)


# what an example need not say that it imports
NAMES = dict(
    torch=torch, nn=nn, **{name: getattr(bcn_mm, name) for name in bcn_mm.__all__}
)
FOUND = [
    test
    for module in modules()
    for test in doctest.DocTestFinder().find(module, globs={**NAMES, **vars(module)})
]
EXAMPLES = {test.name: test for test in FOUND if test.examples}


@pytest.mark.parametrize('name', EXAMPLES)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    lines = []
    assert not runner.run(EXAMPLES[name], out=lines.append).failed, ''.join(lines)


def test_example_sections_are_examples():
    claimed = {
        test.name
        for test in FOUND
        if any(
            line.strip() in ('Example:', 'Examples:')
            for line in (test.docstring or '').splitlines()
        )
    }
    assert claimed
    assert sorted(claimed - set(EXAMPLES)) == []
