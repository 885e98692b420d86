"""The pages can be built, without a warning and without the network."""

import sys

import pytest
import yaml
from conftest import ROOT, run

import bcn_mm


@pytest.mark.slow
def test_pages(tmp_path):
    done = run(
        sys.executable,
        '-m',
        'sphinx',
        '-W',
        '--keep-going',
        '-b',
        'html',
        '-d',
        tmp_path / 'doctrees',
        'docs',
        tmp_path / 'html',
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for page in (ROOT / 'docs').rglob('*.md'):
        if '_build' not in page.parts:
            name = page.relative_to(ROOT / 'docs').with_suffix('.html')
            assert (tmp_path / 'html' / name).is_file()
    api = (tmp_path / 'html' / 'reference' / 'api.html').read_text()
    documented = set(bcn_mm.__all__) - {'__version__'}
    assert [name for name in documented if f'.{name}"' not in api] == []


def test_citation_is_that_of_the_readme():
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert str(cited['version']) == bcn_mm.__version__
    readme = (ROOT / 'README.md').read_text()
    for article in (cited['preferred-citation'], *cited['references']):
        authors = ' and '.join(
            f'{a["family-names"]}, {a["given-names"]}' for a in article['authors']
        )
        entry = (
            f'  title   = {{{article["title"]}}},\n'
            f'  author  = {{{authors}}},\n'
            f'  journal = {{{article["journal"]}}},\n'
            f'  year    = {{{article["year"]}}}\n'
        )
        assert entry in readme
