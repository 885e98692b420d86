"""What is logged, and the picture of it."""

import json
import runpy

import cv2
import pytest
import torch
from conftest import ROOT
from support.singularity import NORMS, Kept, images, train

from bcn_mm import EliminationSingularityHook
from bcn_mm.hooks.singularity import draw_history

TOOL = 'tools/analysis_tools/plot_singularity.py'


def logged(folder):
    (path,) = folder.rglob('scalars.json')
    lines = map(json.loads, path.read_text().splitlines())
    return path, [line for line in lines if 'singularity/dead' in line]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folders of a run with dead channels and of one without."""
    folders = []
    for name, bias in (('healthy', 0.0), ('ill', -40.0)):
        folder = tmp_path_factory.mktemp('runs') / name
        torch.manual_seed(0)
        body = Kept(NORMS['BCN'])
        with torch.no_grad():
            for norm in (body.norm, body.head):
                norm.batch_bias.zero_()
            body.head.batch_bias[:3] = bias
        hook = EliminationSingularityHook(interval=2, window=1)
        train(body, images(7), folder, hook)
        folders.append((folder, hook))
    return folders


def test_what_is_logged(runs, capsys):
    for folder, hook in runs:
        path, lines = logged(folder)
        assert [line['step'] for line in lines] == [2, 4, 6]
        results, line = hook.results, lines[-1]
        assert {k: v for k, v in line.items() if k.count('/') == 1} == {
            f'singularity/{k}': v for k, v in results['network'].items()
        }
        for name, layer in results['layers'].items():
            for key, value in layer['scalars'].items():
                assert line[f'singularity/{name}/{key}'] == value
        text = next(folder.glob('*/*.log')).read_text()
        dead = sum(len(v['dead_channels']) for v in results['layers'].values())
        assert f'steps 6 to 6: of 16 channels {dead} dead' in text
        assert str(path.with_name('singularity.png')) in text
    assert [hook.results['network']['dead'] for _, hook in runs] == [0, 3 / 16]


@pytest.fixture
def plot(monkeypatch, capsys):
    """Run the tool; what it printed."""

    def call(*words):
        monkeypatch.setattr('sys.argv', [TOOL, *map(str, words)])
        runpy.run_path(str(ROOT / TOOL), run_name='__main__')
        return capsys.readouterr().out

    return call


def test_plot_is_the_hooks_own(runs, tmp_path, plot):
    for folder, _ in runs:
        path, _ = logged(folder)
        own = path.with_name('singularity.png')
        assert cv2.imread(str(own)).shape[1] == 900
        out = tmp_path / 'sub' / 'one.png'
        assert plot(folder, '--out', out).strip() == str(out)
        assert out.read_bytes() == own.read_bytes()
        assert not list(out.parent.glob('*.part*'))
        # a line that is just being written
        with open(path, 'a') as file:
            file.write('{"singularity/dead": 0.0, "singul')
        plot(path, '--out', out)
        assert out.read_bytes() == own.read_bytes()
    both = tmp_path / 'both.png'
    plot(*(folder for folder, _ in runs), '--out', both)
    pair = cv2.imread(str(both))
    assert pair.shape[1] == 900 and pair.shape[0] > 300


def test_plot_shows_the_numbers(tmp_path):
    """Colours of the cells follow the dead fraction, layer by layer."""

    def drawn(dead, name):
        tags = {'singularity/dead': 0.5}
        for layer, value in zip('ab', dead):
            tags[f'singularity/{layer}/dead'] = value
            tags[f'singularity/{layer}/margin_min'] = -1.0
        path = tmp_path / f'{name}.png'
        draw_history({'': [(50, tags)]}, str(path))
        picture = cv2.imread(str(path)).astype(int)
        height, width = picture.shape[:2]
        right = picture[:, int(width * 0.75)]
        return right[int(height * 0.3)].sum(), right[int(height * 0.6)].sum()

    top, bottom = drawn((0.0, 1.0), 'down')
    assert top > 600 and bottom < 100  # light, dark
    assert drawn((1.0, 0.0), 'up') == (bottom, top)


def test_layers_of_other_norms_share_a_row(tmp_path):
    def differ(*names):
        keys = ('dead', 'margin_min')
        runs = {
            name: [(50, {f'singularity/{name}/{key}': 0.0 for key in keys})]
            for name in names
        }
        path = tmp_path / 'rows.png'
        draw_history(runs, str(path))
        grey = (cv2.imread(str(path)) == 211).all(2).mean()
        return grey > 0.05

    assert not differ('a.bn1', 'a.gn1') and not differ('a.gn', 'a.bn')
    assert differ('a.bn1', 'a.gn2') and differ('a.0', 'a.1')


def test_plot_errors(runs, tmp_path, refused):
    (folder, _), _ = runs
    assert 'no file or folder' in refused(TOOL, tmp_path / 'none')
    assert 'no vis_data/scalars.json' in refused(TOOL, tmp_path)
    log = tmp_path / 'scalars.json'
    log.write_text('{"loss": 1.0, "step": 1}\n')
    assert 'nothing of EliminationSingularityHook' in refused(TOOL, log)
    log.write_text('{"singularity/dead" 0.0}\n{"loss": 1.0}\n')
    assert 'line 1, is damaged' in refused(TOOL, log)
    assert 'as many different --labels' in refused(
        TOOL, folder, folder, '--labels', 'a'
    )
    assert 'as many different --labels' in refused(TOOL, folder, folder)
    assert 'does not end in .png' in refused(TOOL, folder, '--out', 'a.jpg')
