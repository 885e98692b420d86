"""What a command line gives, checked, and what is wrong with it in one line.

Arguments, configs, the weights that a model starts from, and pictures.
"""

import argparse
import errno
import os
import re
import sys
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Iterator, List, NoReturn, Optional, Type

import cv2
import numpy as np
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS

from ..convert import read_config, type_name, walk
from ..errors import InputError
from ..weights.reading import read_checkpoint

# The names of the authors' checkpoints, once converted -> as they are offered
_AUTHORS = {
    f'{name}_mm.pth': f'{name}.pth'
    for name in ('rn50_bcn_ws', 'rn101_bcn_ws', 'rx50_bcn_ws')
}
# What mmengine downloads by itself, of the same architectures.
_JHU = {
    'rn50_bcn_ws.pth': 'resnet50_gn_ws',
    'rn101_bcn_ws.pth': 'resnet101_gn_ws',
    'rx50_bcn_ws.pth': 'resnext50_32x4d_gn_ws',
}
_SITE = 'github.com/joe-siyuan-qiao/Batch-Channel-Normalization'
_PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


# What mmengine calls weights to start from, as it is registered and as a class
_STARTS = ('Pretrained', 'PretrainedInit')
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def one_line_errors(
    config: Optional[str] = None, only: Type[Exception] = Exception
) -> Iterator[None]:
    """Turn an exception into one line on stderr and exit status 1.

    For the part of a program that depends on what its user gave: arguments,
    config, files. ``BCN_MM_TRACEBACK=1`` shows the whole traceback instead.

    Args:
        config (str, optional): Is named where the exception is not one of
            ours, which name what they are about.
        only (type): The exceptions that are turned; a full disk always is.
            Of a part that turns all of them, warnings come at its end, if it
            ends well.
    """
    try:
        with warnings_held() if only is Exception else nullcontext():
            yield
    except Exception as e:
        full = isinstance(e, OSError) and e.errno in _FULL
        if os.environ.get('BCN_MM_TRACEBACK') or not (full or isinstance(e, only)):
            raise
        text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        text = text if text.strip() else type(e).__name__
        if full:
            text = f'disk full: {text}'
        elif not isinstance(e, (InputError, ValueError, FileNotFoundError)):
            text = f'{type(e).__name__}: {text}'
        if config and not isinstance(e, InputError):
            text = f'config {config}: {text}'
        end(text)


@contextmanager
def warnings_held() -> Iterator[None]:
    """Show warnings at the end, and none where that is an exception."""
    held = []
    show = warnings.showwarning
    warnings.showwarning = lambda *args: held.append(args)
    try:
        yield
    finally:
        warnings.showwarning = show
    for args in held:
        show(*args)


def end(text: str) -> NoReturn:
    """Say what is wrong in one line on stderr, and exit with status 1."""
    # straight to the descriptor: loggers may hold the streams
    sys.stderr.flush()
    text = ' '.join(text.split())
    print(f'error: {text} (BCN_MM_TRACEBACK=1 shows where)', file=sys.stderr)
    sys.exit(1)


class Options(DictAction):
    """``KEY=VALUE ...`` on a command line; other words end it in one line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        for word in values:
            if not word.partition('=')[0].strip() or '=' not in word:
                end(f'{option_string}: {word!r} must be KEY=VALUE')
            try:
                super().__call__(parser, namespace, [word], option_string)
            except Exception as e:
                end(f'{option_string} {word}: {e}')

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """mmengine's, which takes the spaces out of everything: not of a path."""
        text = val.strip('\'" ')
        if ' ' in text and ',' not in text and text[0] not in '([':
            return text
        return DictAction._parse_iterable(val)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``tools/train.py`` and ``tools/test.py`` share.

    They are what :func:`load_config` asks for beside ``config``.
    """
    parser.add_argument(
        '--work-dir',
        help="where logs and results go (default: the config's, else "
        'work_dirs/NAME_OF_THE_CONFIG)',
    )
    _add_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started this process (%(default)s)',
    )
    # handed over by launchers that do not set the environment variable
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``, for tools that take no more of :func:`add_arguments`."""
    _add_options(parser)
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. model.backbone.depth=101 '
        'or model.neck.in_channels="[1,2,3]"',
    )


def read_file(source: str) -> Config:
    """Read a config, or say in one line why that cannot be done.

    Args:
        source (str): The path of a config, in either style, or one of an
            installed package: ``'mmdet::...'``, ``'mmseg::...'``,
            ``'bcn_mm::...'``.

    Raises:
        InputError: if there is none, it does not parse, raises or says
            nothing, or its scope is not installed.
    """
    if '::' not in source:
        if os.path.isdir(source):
            raise InputError(f'config {source} is a folder: name a file in it')
        if not os.path.isfile(source):
            raise InputError(f'config {source} does not exist')
    try:
        cfg = read_config(source)
        # imports what a new-style config says its model is made of
        for _ in walk(cfg.get('model')):
            pass
    except (Exception, SystemExit) as e:  # a config may do anything
        if '::' in source and isinstance(e, FileNotFoundError):
            raise InputError(f'config {e}') from e
        raise InputError(
            f'config {source} cannot be read: {type(e).__name__}: {e}'
        ) from e
    if not cfg:
        raise InputError(f'config {source} is empty')
    if '::' in source:
        # not that of what it was read through: logs and copies go by it
        object.__setattr__(cfg, '_filename', source)
    check_scope(cfg, source)
    return cfg


def check_scope(cfg: Config, source: str) -> None:
    """Make sure that somebody registers types in the scope of a config.

    Args:
        cfg (Config): Of any style.
        source (str): Its file, for the message.

    Raises:
        InputError: if there is neither a package nor a registry of its name.
    """
    scope = cfg.get('default_scope')
    if scope is None or scope == MODELS.scope or scope in MODELS.children:
        return
    if not (isinstance(scope, str) and scope.isidentifier() and find_spec(scope)):
        raise InputError(f'config {source} is of scope {scope!r}, which is not here')


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and merge the shared arguments into it.

    Args:
        args (Namespace): With ``config`` and what :func:`add_arguments` or
            :func:`add_options` adds.

    Raises:
        InputError: as of :func:`read_file`, or if an option does not fit.
    """
    path = args.config
    cfg = read_file(path)
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except Exception as e:
        raise InputError(f'--cfg-options do not fit {path}: {e}') from e
    check_scope(cfg, path)
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir or not cfg.get('work_dir'):
        name = os.path.splitext(os.path.basename(path.rpartition('::')[2]))[0]
        cfg.work_dir = args.work_dir or os.path.join('work_dirs', name)
    return cfg


def check_pretrained(cfg: Config) -> None:
    """Make sure that the files are there which a model is to start from.

    mmengine looks for them when it initializes weights, after everything else
    has been built.

    Args:
        cfg (Config): Of a training; is left as it is.

    Raises:
        InputError: if a local one is missing, says how to get it and how to
            do without; if it cannot be read or holds numbers that are not
            finite, says so.
    """
    for name, node in walk(cfg.get('model') or {}, 'model'):
        if type_name(node) in _STARTS:
            # one of a list goes with the list
            _check_start(node.get('checkpoint'), re.sub(r'\.\d+$', '', name))
        path = node.get('pretrained')
        # other packages have models that know names of weights
        if isinstance(path, str) and os.path.splitext(path)[1]:
            _check_start(path, f'{name}.pretrained')


def _check_start(path: Any, name: str) -> None:
    if '://' in str(path):
        return
    if isinstance(path, str) and os.path.isfile(path):
        read_checkpoint(path)
        return
    source = _AUTHORS.get(os.path.basename(str(path)))
    get = ''
    if source:
        backbone = name.rpartition('.')[0]
        get = (
            f'get {source} from {_SITE} and convert it (python tools/'
            f'model_converters/authors_to_mm.py {source} {path}), start from '
            f"mmdet's GN + WS backbone, as the recipes called *-jhu do "
            f'(--cfg-options {name}.checkpoint=open-mmlab://jhu/{_JHU[source]} '
            f'{backbone}.conv_cfg.dialect=std), or '
        )
    raise InputError(
        f'{name}: checkpoint {path} does not exist; {get}start from '
        f'random weights (--cfg-options {name}=None)'
    )


def forget_pretrained(model: dict) -> None:
    """Have a model's config start from random weights, in place."""
    for _, node in walk(model):
        node.pop('pretrained', None)
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [e for e in init_cfg if 'checkpoint' not in e]
        elif 'checkpoint' in (init_cfg or ()):
            node['init_cfg'] = None


def check_folder(path: str, option: str) -> None:
    """Make sure that a folder can be made and written to, without doing so.

    Args:
        path (str): It need not exist.
        option (str): That named it, for the message.

    Raises:
        InputError: if it cannot.
    """
    _check_place(os.path.abspath(path), f'{option} {path}')


def check_file(path: str, option: str) -> None:
    """The same of a file, which is to be written whole."""
    if os.path.isdir(path):
        raise InputError(f'{option} {path} is a folder: name a file in it')
    _check_place(os.path.dirname(os.path.abspath(path)), f'{option} {path}')


def _check_place(folder: str, what: str) -> None:
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        where = '' if what.endswith(folder) else f': {folder}'
        raise InputError(f'{what}{where} is a file, not a folder')
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f'{what}: {folder} cannot be written to')


def claim_folder(path: str, option: str) -> None:
    """Make a folder, and sure that files can be written there.

    Raises:
        InputError: if that cannot be done.
    """
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise InputError(f'{option} {path} cannot be written to: {e.strerror}') from e


def find_pictures(path: str) -> List[str]:
    """The picture files that a path names: itself, or those in a folder.

    Args:
        path (str): Of a picture or a folder.

    Returns:
        list[str]: sorted by name; never empty.

    Raises:
        InputError: if there is no such file or folder, or no picture in it.
    """
    if os.path.isdir(path):
        found = [
            os.path.join(path, name)
            for name in sorted(os.listdir(path))
            if name.lower().endswith(_PICTURES)
        ]
        if not found:
            raise InputError(f'no pictures ({", ".join(_PICTURES)}) in {path}')
        return found
    if not os.path.isfile(path):
        raise InputError(f'there is no picture or folder {path}')
    return [path]


def check_picture(path: str) -> None:
    """Make sure that a file can be decoded as a picture.

    Args:
        path (str): An existing file.

    Raises:
        InputError: if it cannot.
    """
    with open(path, 'rb') as file:
        data = np.frombuffer(file.read(), np.uint8)
    if not data.size or cv2.imdecode(data, cv2.IMREAD_COLOR) is None:
        raise InputError(f'{path} is damaged or no picture')
