"""The messages that the guide explains are those of the code."""

import ast
import re

import pytest
from conftest import ROOT

PAGE = (ROOT / 'docs' / 'guides' / 'troubleshooting.md').read_text()
MESSAGES = re.findall(r'^\| `([^`]+)` \|', PAGE, re.M)
SAID = [
    node.value
    for folder in ('bcn_mm', 'tools')
    for path in (ROOT / folder).glob('**/*.py')
    if '.mim' not in path.parts
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
]


@pytest.mark.parametrize('message', MESSAGES)
def test_message_is_said(message):
    assert any(message in text for text in SAID)


def test_there_are_messages():
    assert MESSAGES
