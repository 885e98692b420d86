"""What a command line gives, checked, and what is wrong with it in one line.

Arguments, configs, the weights that a model starts from, and pictures.
"""

import argparse
import os
import sys
from contextlib import contextmanager
from typing import Iterator, List

import cv2
import numpy as np
from mmengine.config import Config, DictAction

from ..convert import walk
from ..errors import InputError
from ..weights.reading import read_checkpoint

# The names of the authors' checkpoints, once converted -> as they are offered
_AUTHORS = {
    f'{name}_mm.pth': f'{name}.pth'
    for name in ('rn50_bcn_ws', 'rn101_bcn_ws', 'rx50_bcn_ws')
}
_SITE = 'github.com/joe-siyuan-qiao/Batch-Channel-Normalization'
_PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr and exit status 1.

    For the part of a program that depends on what its user gave: arguments,
    config, files. ``BCN_MM_TRACEBACK=1`` shows the whole traceback instead.
    """
    try:
        yield
    except Exception as e:
        if os.environ.get('BCN_MM_TRACEBACK'):
            raise
        text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        text = ' '.join(text.split()) or type(e).__name__
        if not isinstance(e, (InputError, ValueError, FileNotFoundError)):
            text = f'{type(e).__name__}: {text}'
        # straight to the descriptor: loggers may hold the streams
        sys.stderr.flush()
        print(f'error: {text} (BCN_MM_TRACEBACK=1 shows where)', file=sys.stderr)
        sys.exit(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``tools/train.py`` and ``tools/test.py`` share."""
    parser.add_argument(
        '--work-dir',
        help="where logs and results go (default: the config's, else "
        'work_dirs/NAME_OF_THE_CONFIG)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. model.backbone.depth=101 '
        'or model.neck.in_channels="[1,2,3]"',
    )
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


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and merge the shared arguments into it.

    Args:
        args (Namespace): With ``config`` and what :func:`add_arguments` adds.

    Raises:
        InputError: if the file is missing, does not parse, or an option does
            not fit it.
    """
    path = args.config
    if not os.path.isfile(path):
        raise InputError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(path)
    except Exception as e:
        raise InputError(
            f'config {path} cannot be read: {type(e).__name__}: {e}'
        ) from e
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except Exception as e:
        raise InputError(f'--cfg-options do not fit {path}: {e}') from e
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.work_dir or not cfg.get('work_dir'):
        name = os.path.splitext(os.path.basename(path))[0]
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
        path = node.get('checkpoint')
        if node.get('type') != 'Pretrained' or '://' in str(path):
            continue
        if os.path.isfile(path):
            read_checkpoint(path)
            continue
        source = _AUTHORS.get(os.path.basename(path))
        get = (
            f'get {source} from {_SITE} and convert it (python tools/'
            f'model_converters/authors_to_mm.py {source} {path}), or '
            if source
            else ''
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
