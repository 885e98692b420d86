"""What mim and the READMEs say of the recipes."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from support.recipes import QUICK, RECIPES


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


@pytest.mark.parametrize(
    'folder', sorted({p.parent for p in RECIPES}), ids=lambda f: f.name
)
def test_readme_links_every_recipe(folder):
    text = (folder / 'README.md').read_text()
    links = re.findall(r'\]\(([^)#:]+\.(?:py|md))\)', text)
    assert all((folder / link).is_file() for link in links)
    recipes = {p.name for p in folder.glob('*.py')}
    assert recipes == {link for link in links if link.endswith('.py')}
