"""The reference has every argument of what is registered, with its default."""

import ast
import inspect
import re

import pytest
from conftest import ROOT

import bcn_mm

TEXT = (ROOT / 'docs' / 'reference' / 'layers.md').read_text()
# what is not of a config: the component that builds a norm knows these
NOT_OF_CONFIGS = {'self', 'num_features', 'device', 'dtype'}
OF_MMCV = dict(BCN={'requires_grad': True})


def arguments(name):
    """Argument -> default, as a string if there is none, in a section's table."""
    section = re.split(r'^## ', TEXT, flags=re.M)
    (section,) = [s for s in section if re.match(rf'{name}\b', s)]
    rows = re.findall(r'^\| `(\w+)` \| *(.*?) *\|', section, re.M)
    return {argument: default.strip('`') for argument, default in rows}


@pytest.mark.parametrize(
    'name',
    [
        'BCN',
        'WSConv2d',
        'WithBCN',
        'EliminationSingularityHook',
        'SyncEstimatesHook',
    ],
)
def test_arguments(name):
    found = getattr(bcn_mm, name)
    signature = inspect.signature(
        found.__init__ if inspect.isclass(found) else found
    ).parameters.values()
    wanted = {
        p.name: p.default
        for p in signature
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in NOT_OF_CONFIGS
    }
    wanted.update(OF_MMCV.get(name, {}))
    documented = arguments(name)
    assert set(documented) == set(wanted)
    for argument, default in wanted.items():
        text = documented[argument]
        if default is inspect.Parameter.empty:
            assert text == ''
        elif text == "dict(type='BCN')":  # what None stands for
            assert default is None
        else:
            assert ast.literal_eval(text) == default
