"""The survey of the zoo, on two configs."""

import json
import re

import pytest

pytestmark = pytest.mark.slow
SURVEY = ('-m', 'studies.zoo_survey')
FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
BISENET = 'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py'


def test_survey(tmp_path, python):
    file = tmp_path / 'survey.json'
    words = ['--json', file, '--only', FCOS, BISENET]
    shown = python(*SURVEY, *words, COLUMNS='160')
    configs = json.loads(file.read_text())['configs']
    assert set(configs) == {FCOS, BISENET}
    for result in configs.values():
        assert 'error' not in result and not result['left']
        assert result['converted'] == {'BCN': sum(result['stock'].values())}
    assert configs[FCOS]['levels'] == [5]
    assert re.search(r'all\D+2\D+2\D+2\D+2\D', shown)
    # what is there is taken up again, and only the rest is done
    content = json.loads(file.read_text())
    content['configs'][FCOS]['parameters'] = 7
    del content['configs'][BISENET]
    file.write_text(json.dumps(content))
    python(*SURVEY, *words, '--steps', '--timeout', 500, timeout=900)
    content = json.loads(file.read_text())
    assert content['configs'][FCOS]['parameters'] == 7
    assert BISENET in content['configs']
    for folder in ('mmdet::fcos', 'mmseg::bisenetv1'):
        steps = content['steps'][folder]
        assert 'error' not in steps and 'stock' in steps
        assert steps['converted']['moved'] > 0
    shown = python(*SURVEY, *words, '--ws', code=1)
    assert 'choose another --json, or --fresh' in shown
    shown = python(*SURVEY, '--packages', 'mmyolo', code=1)
    assert 'mmyolo is not installed' in shown
    assert 'no config matches' in python(*SURVEY, '--only', 'x::*', code=1)
