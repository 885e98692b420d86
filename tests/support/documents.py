"""What the documents name, and whether it is there.

Each check takes a document's path and text and returns its complaints.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Optional, Tuple
from unittest import mock
from urllib.parse import unquote

from conftest import ROOT, run
from markdown_it import MarkdownIt
from markdown_it.token import Token

DOCUMENTS = sorted(
    {
        *ROOT.glob('*.md'),
        *(p for p in ROOT.glob('docs/**/*.md') if '_build' not in p.parts),
        *ROOT.glob('configs/*/README.md'),
        *ROOT.glob('bcn_mm/**/README.md'),
    }
)
# of the repository, whose files documents name by their paths; and of the package
FOLDERS = (
    *('bcn_mm', 'benchmarks', 'configs', 'csrc', 'docs', 'requirements', 'studies'),
    *('tests', 'tools'),
    *('convert', 'deploy', 'engine', 'hooks', 'layers', 'ops', 'weights'),
)
# what stands before a path is no part of a longer one
_PATH = re.compile(rf'(?<![\w./:-])(?:{"|".join(FOLDERS)})/[\w./*-]*')
_NAME = re.compile(r'(?<![\w./-])bcn_mm(?:\.\w+)+')
_SHELL = {'bash', 'sh', 'console'}
_OTHER_PROGRAMS = {'cd', 'mim', 'pip'}


def _tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt('commonmark').enable('table').parse(text):
        yield token
        yield from token.children or ()


def _code(text: str) -> Iterator[Tuple[str, str]]:
    """Language and content of every piece of code; 'inline' for backticks."""
    for token in _tokens(text):
        if token.type == 'code_inline':
            yield 'inline', token.content
        elif token.type in ('fence', 'code_block'):
            yield token.info.strip(), token.content


def anchors(text: str) -> List[str]:
    """The anchors of a document's headings, as viewers of Markdown make them."""
    found, inside = [], False
    for token in MarkdownIt('commonmark').parse(text):
        if inside:
            title = ''.join(t.content for t in token.children).lower()
            slug = re.sub(r'[^\w\- ]', '', title).replace(' ', '-')
            again = sum(bool(re.fullmatch(rf'{slug}(-\d+)?', a)) for a in found)
            found.append(f'{slug}-{again}' if again else slug)
        inside = token.type == 'heading_open'
    return found


def broken_links(path: Path, text: str) -> List[str]:
    """Relative links and pictures that lead nowhere, anchors included."""
    complaints = []
    for token in _tokens(text):
        if token.type not in ('link_open', 'image'):
            continue
        link = token.attrs['href' if token.type == 'link_open' else 'src']
        if re.match(r'https?://', link):
            continue
        name, _, anchor = link.partition('#')
        target = (path.parent / unquote(name)).resolve() if name else path
        if not re.fullmatch(r'[\w./-]*', name):
            complaints.append(f'{link}: not safe in an URL')
        elif ROOT not in (target, *target.parents) or not target.exists():
            complaints.append(f'{link}: no such file')
        elif anchor:
            content = text if target == path else target.read_text()
            if target.suffix != '.md' or anchor not in anchors(content):
                complaints.append(f'{link}: no such heading')
    return complaints


def _is_there(path: str) -> bool:
    return any(list((ROOT / base).glob(path)) for base in ('', 'bcn_mm'))


def _is_generated(path: str) -> bool:
    return not subprocess.run(['git', 'check-ignore', '-q', path], cwd=ROOT).returncode


def missing_files(path: Path, text: str) -> List[str]:
    """Paths in code, from the repository's or the package's root, that are not."""
    return [
        f'{name}: no such file'
        for _, code in _code(text)
        for name in (found.rstrip('.') for found in _PATH.findall(code))
        if not _is_there(name) and not _is_generated(name)
    ]


def unknown_names(path: Path, text: str) -> List[str]:
    """Dotted names of bcn_mm's in code that are none."""
    return [
        f'{name}: no such name'
        for _, code in _code(text)
        for name in _NAME.findall(code)
        if not _resolves(name)
    ]


def _resolves(name: str) -> bool:
    known, found = 'bcn_mm', importlib.import_module('bcn_mm')
    for part in name.split('.')[1:]:
        known += f'.{part}'
        if not hasattr(found, part):
            try:
                importlib.import_module(known)
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


def commands(text: str) -> Iterator[Tuple[str, List[str]]]:
    """Every command in code: the folder that it is run in, and its words."""
    for language, code in _code(text):
        if language != 'inline' and language not in _SHELL:
            continue
        folder = ''
        for line in code.replace('\\\n', ' ').splitlines():
            if language == 'inline' and not re.match(
                r'(\w+=\S+ )*(python|bash|torchrun) ', line
            ):
                continue
            words = shlex.split(line, comments=True)
            while words and re.match(r'\w+=', words[0]):
                words = words[1:]
            if words and words[0] == 'cd':
                folder = words[1]
            if words:
                yield folder, words


def program_of(folder: str, words: List[str]) -> Tuple[Optional[str], List[str]]:
    """A script's path or ``-m MODULE``, None if it is not ours; and its arguments."""
    if words[0] in _OTHER_PROGRAMS:
        return None, []
    if words[:2] == ['python', '-m']:
        return f'-m {words[2]}', words[3:]
    at = next((i for i, w in enumerate(words) if w.endswith(('.py', '.sh'))), 0)
    script = (ROOT / folder / words[at]).resolve()
    if ROOT in script.parents:
        return str(script.relative_to(ROOT)), words[at + 1 :]
    return str(script), words[at + 1 :]


def _help_here(words: List[str]) -> Optional[str]:
    """The same in this process, which has imported already what takes long."""
    is_module = words[0] == '-m'
    folder = ROOT if is_module else (ROOT / words[0]).parent
    shown = io.StringIO()
    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch.object(sys, 'argv', [words[-1], '--help']))
        changed.enter_context(
            mock.patch.object(sys, 'path', [str(folder), str(ROOT), *sys.path])
        )
        changed.enter_context(mock.patch.dict(os.environ, COLUMNS='200'))
        changed.enter_context(contextlib.redirect_stdout(shown))
        try:
            if is_module:
                runpy.run_module(words[1], run_name='__main__')
            else:
                runpy.run_path(str(ROOT / words[0]), run_name='__main__')
        except SystemExit as end:
            return None if end.code else shown.getvalue()
        except (FileNotFoundError, ImportError):
            pass
    return None


@functools.lru_cache
def help_of(program: str) -> Optional[str]:
    """What ``--help`` prints, None if that fails.

    A shell script that ends in another program hands its arguments on to it.
    """
    if program.endswith('.sh'):
        script = ROOT / program
        if not script.is_file():
            return None
        _, _, last = script.read_text().rpartition('\nexec ')
        scripts = re.findall(r'(\w+\.py)"? ', last)
        if '\nexec ' in script.read_text() and '"$@"' in last:
            if scripts:
                return help_of(f'tools/{scripts[-1]}')
            return help_of(re.search(r'-m \w+', last).group())
        command = ['bash', program]
    elif program.startswith(('tools/', 'benchmarks/', 'studies/', '-m studies.')):
        return _help_here(program.split())
    else:
        command = [sys.executable, *program.split()]
    done = run(*command, '--help', COLUMNS='200', timeout=120)
    return None if done.returncode else done.stdout


def broken_commands(path: Path, text: str) -> List[str]:
    """Commands whose program does not start, or does not know an option."""
    complaints = []
    for folder, words in commands(text):
        program, arguments = program_of(folder, words)
        if program is None:
            continue
        known = help_of(program)
        if known is None:
            complaints.append(f'{program}: does not start')
            continue
        for word in arguments:
            option = word.partition('=')[0]
            if option == '--help':
                continue
            if re.match(r'--?[A-Za-z]', word) and not re.search(
                rf'(?<![\w-]){re.escape(option)}(?![\w-])', known
            ):
                complaints.append(f'{program}: has no {option}')
    return complaints
