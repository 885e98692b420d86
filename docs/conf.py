"""Sphinx: python -m sphinx -W -b html docs docs/_build/html"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what is documented is what lies beside this, wherever else bcn_mm is installed
sys.path.insert(0, str(ROOT))

project = 'bcn_mm'
author = 'the authors of bcn_mm'
text = (ROOT / 'bcn_mm' / 'version.py').read_text()
release = version = re.search(r"__version__ = '(.+)'", text).group(1)

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']

# pages are read in the repository too, whose viewers make such anchors
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_inherit_docstrings = False
autodoc_typehints = 'none'  # types stand in the docstrings
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# a reference to something of bcn_mm leads somewhere
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!bcn_mm\.).*')]

html_theme = 'furo'
html_title = f'bcn_mm {release}'


def take_along(app, docname, source):
    """Make links to configs/ links to copies, since these are no pages."""
    source[0] = re.sub(
        r'\]\(((?:\.\./)+configs/[^)#]+)(?:#[^)]+)?\)', r'](path:\1)', source[0]
    )


def setup(app):
    app.connect('source-read', take_along)
