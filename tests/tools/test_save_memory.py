"""``--save-memory`` in real trainings: the same bits, in less memory."""

import re

import pytest
import torch
from conftest import ROOT
from test_train_test import CONFIGS, QUIET, SHORT, checkpoints

from bcn_mm.weights.reading import read_checkpoint

pytestmark = pytest.mark.slow

# what else may be in a training, validations among it
MORE = """
custom_hooks = [
    dict(type='EliminationSingularityHook', interval=4, window=2),
    dict(type='EMAHook'),
    dict(type='SyncEstimatesHook'),
]
optim_wrapper = dict(accumulative_counts=2)
"""


def tensors(value, path=''):
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f'{path}/{key}')
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from tensors(part, f'{path}/{i}')


@pytest.mark.parametrize('task', CONFIGS)
def test_the_same_training(task, shapes, tmp_path, python):
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{ROOT / CONFIGS[task]}'\n{MORE}")
    ends = []
    for words in ([], ['--save-memory']):
        folder = tmp_path / f'work{len(words)}'
        shown = python(
            'tools/train.py',
            config,
            '--work-dir',
            folder,
            *words,
            '--cfg-options',
            *SHORT[task],
            *QUIET,
            SHAPES_ROOT=str(shapes),
            OMP_NUM_THREADS='1',
        )
        ends.append(dict(tensors(read_checkpoint(str(checkpoints(folder)[-1])))))
    without, again = ends
    assert without.keys() == again.keys() and len(without) > 300
    for name, value in without.items():
        assert torch.equal(value, again[name]), name
    (line,) = re.findall('RecomputeActivationsHook: (.*)', shown)
    spared, of = map(int, re.match(r'(\d+) MiB of (\d+) ', line).groups())
    assert 0.2 * of < spared < of
