"""What mim and the READMEs say of the recipes."""

import re
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, import_mmpretrain
from support.recipes import QUICK, RECIPES, norm_of

FOLDERS = sorted({p.parent for p in RECIPES})
TOOL = 'tools/misc/generate_metafiles.py'
GENERATOR = runpy.run_path(str(ROOT / TOOL))


def test_model_index():
    """mim finds every recipe, once."""
    listed, names = [], set()
    for metafile in yaml.safe_load((ROOT / 'model-index.yml').open())['Import']:
        content = yaml.safe_load((ROOT / metafile).open())
        collections = {c['Name'] for c in content['Collections']}
        for c in content['Collections']:
            assert (ROOT / c['README']).is_file()
            assert c['Paper']['URL'] and c['Paper']['Title'] and c['Code']
        for m in content['Models']:
            assert m['In Collection'] in collections
            assert m['Name'] == Path(m['Config']).stem
            assert Path(m['Config']).parent == Path(metafile).parent
            assert m['Name'] not in names
            names.add(m['Name'])
            listed.append(ROOT / m['Config'])
    assert sorted(listed) == RECIPES
    assert names >= QUICK


def test_model_index_as_mim_reads_it():
    modelindex = pytest.importorskip(
        'modelindex.load_model_index', reason='modelindex is not installed'
    )
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert len(index.models) == len(RECIPES)


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda f: f.name)
def test_readme_links_every_recipe(folder):
    text = (folder / 'README.md').read_text()
    links = re.findall(r'\]\(([^)#:]+\.(?:py|md))(?:#[^)]*)?\)', text)
    assert all((folder / link).is_file() for link in links)
    recipes = {p.name for p in folder.glob('*.py')}
    assert recipes == {link for link in links if link.endswith('.py')}


def rows(readme):
    """The tables of recipes: the cells of a row by column, and its recipe."""
    text = readme.read_text()
    for table in re.findall(r'<!-- recipes: [^>]+ -->\n(.+?)<!--', text, re.S):
        head, _, *lines = table.strip().splitlines()
        columns = [cell.strip() for cell in head.strip('|').split('|')]
        for line in lines:
            cells = [cell.strip() for cell in line.strip('|').split('|')]
            row = dict(zip(columns, cells))
            assert len(cells) == len(columns) and all(cells)
            (name, link) = re.fullmatch(r'\[(.+)\]\((.+)\)', row['recipe']).groups()
            assert link == f'{name}.py'
            yield row, readme.parent / link


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda f: f.name)
def test_tables_say_what_names_say(folder):
    listed = []
    for row, recipe in rows(folder / 'README.md'):
        listed.append(recipe)
        name = recipe.stem
        norm = row['norm'].lower().replace(' + ', '-').replace(', ', '-')
        # one takes batch statistics over all GPUs
        assert norm.replace('syncbcn', 'bcn') == norm_of(recipe)
        backbone = re.search(r'([rx]\d+(?:-32x4d)?)[-_]', name.replace('esnet', ''))
        assert row['backbone'].lower() == backbone.group(1)
        per_gpu = re.search(r'8xb(\d+)', name + '8xb1').group(1)
        assert row['GPUs x images'] == f'8 x {per_gpu}'
        if name.endswith('_coco'):
            epochs = {'1x': 12, '2x': 24}[name.split('_')[-2]]
            assert row['schedule'] == f'{epochs} epochs'
        iterations = re.search(r'-(\d+)k_', name)
        if iterations:
            assert row['schedule'].startswith(f'{iterations.group(1)},')
            assert row['crop'] == name.split('-')[-1]
        else:
            assert 'crop' not in row
    assert sorted(listed) == sorted(p for p in RECIPES if p.parent == folder)


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda f: f.name)
def test_files_are_what_is_generated(folder):
    if folder.name == 'resnet':
        import_mmpretrain()
    for path, text in GENERATOR['files_of'](folder).items():
        assert path.read_text() == text, f'run {TOOL}'


def test_model_index_is_what_is_generated():
    for path, text in GENERATOR['model_index']().items():
        assert path.read_text() == text, f'run {TOOL}'


def test_generator(tmp_path, monkeypatch, capsys):
    """It writes what is missing or old, and with --check only says so."""
    for name in ('_base_', 'pspnet'):
        shutil.copytree(ROOT / 'configs' / name, tmp_path / 'configs' / name)
    tool = tmp_path / TOOL
    tool.parent.mkdir(parents=True)
    shutil.copy(ROOT / TOOL, tool)

    def generate(*words):
        monkeypatch.setattr('sys.argv', [TOOL, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(tool), run_name='__main__')
        return end.value.code, capsys.readouterr().out.split()

    index = tmp_path / 'model-index.yml'
    metafile = tmp_path / 'configs/pspnet/metafile.yml'
    readme = tmp_path / 'configs/pspnet/README.md'
    want = metafile.read_text(), readme.read_text()
    row = next(line for line in want[1].splitlines() if '.py)' in line)
    old = want[1].replace(f'{row}\n', '')
    readme.write_text(old)
    metafile.unlink()
    names = [str(p.relative_to(tmp_path)) for p in (index, readme, metafile)]
    assert generate('--check') == (1, names)
    assert readme.read_text() == old
    assert not metafile.exists() and not index.exists()

    assert generate() == (0, names)
    assert (metafile.read_text(), readme.read_text()) == want
    assert yaml.safe_load(index.read_text()) == dict(Import=[names[2]])
    assert generate('--check') == (0, [])

    readme.write_text(want[1].replace('<!-- recipes: Cityscapes -->', ''))
    with pytest.raises(ValueError, match='no <!-- recipes: Cityscapes -->'):
        runpy.run_path(str(tool))['files_of'](readme.parent)
