"""Write a model as ONNX and check what was written on real pictures.

Exported is what the model computes of preprocessed pictures (N, 3, H, W)
before anything depends on values: the features of backbone and neck of an
mmdet model, the logits of an mmseg or mmpretrain model. Batch, height and
width stay variable, and only standard operators are used. onnxruntime then
computes the same of real pictures as PyTorch, or nothing is written.
"""

import argparse
import copy
import logging
import os
import warnings
from importlib.util import find_spec
from typing import Iterator, List

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from torch import Tensor, nn

from bcn_mm._files import replacing
from bcn_mm.convert import scope_of, type_name
from bcn_mm.deploy import (
    EXPORTERS,
    OPSET,
    UNUSED,
    Deployed,
    Folding,
    export_onnx,
    fold,
    onnx_difference,
)
from bcn_mm.engine.cli import (
    add_options,
    check_file,
    check_picture,
    find_pictures,
    forget_pretrained,
    load_config,
    one_line_errors,
)
from bcn_mm.errors import InputError
from bcn_mm.weights.reading import check_match, read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/deployment/export_onnx.py CONFIG CHECKPOINT --out model.onnx \\
      --fold
  python tools/deployment/export_onnx.py CONFIG CHECKPOINT --out model.onnx \\
      --images FOLDER --part backbone --exporter trace""",
    )
    parser.add_argument(
        'config', help='of an mmdet, mmseg, mmpretrain model, or mmdet::...'
    )
    parser.add_argument('checkpoint', nargs='?', help='weights (default: random ones)')
    parser.add_argument(
        '--out', required=True, metavar='FILE.onnx', help='what to write'
    )
    parser.add_argument(
        '--fold',
        action='store_true',
        help='fold batch stages and Weight Standardization into the convolutions first',
    )
    parser.add_argument(
        '--part',
        choices=['model', 'backbone'],
        default='model',
        help='(%(default)s)',
    )
    parser.add_argument(
        '--images',
        metavar='PATH',
        help='a picture or a folder of them, for the check (default: the '
        "config's test set)",
    )
    parser.add_argument(
        '--count',
        type=int,
        default=10,
        help='how many pictures to check at most (%(default)s)',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='the largest difference allowed, relative to the largest value '
        'of each output (%(default)s)',
    )
    parser.add_argument(
        '--exporter',
        choices=EXPORTERS,
        default=EXPORTERS[0],
        help="torch's current exporter or its older, faster one (%(default)s)",
    )
    parser.add_argument(
        '--opset', type=int, default=OPSET, help='of ONNX (%(default)s)'
    )
    add_options(parser)
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Whatever can be refused before the model is built."""
    if not args.out.endswith('.onnx'):
        raise InputError(f'--out must be an .onnx file, but got {args.out}')
    check_file(args.out, '--out')
    if args.count < 1:
        raise InputError(f'--count must be at least 1, but got {args.count}')
    if not args.tolerance > 0:
        raise InputError(f'--tolerance must be positive, but got {args.tolerance}')
    if args.opset < OPSET:
        raise InputError(f'--opset must be at least {OPSET}, but got {args.opset}')
    needed = ['onnx', 'onnxruntime']
    if args.exporter == 'dynamo':
        needed.append('onnxscript')
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise InputError(
            f'this needs {" and ".join(missing)}: pip install {" ".join(missing)}'
        )


def build(cfg: Config, checkpoint: str = None) -> nn.Module:
    """The model in evaluation mode, with the weights of a checkpoint.

    Without one they are random, as training would start from: layers as torch
    makes them can be so ill-conditioned together that no check succeeds.
    """
    if 'model' not in cfg:
        raise InputError(f'{cfg.filename} has no model')
    state = read_checkpoint(checkpoint) if checkpoint else None
    init_default_scope(scope_of(cfg) or 'mmengine')
    node = copy.deepcopy(cfg.model)
    # segmenters and classifiers otherwise take it from the top level
    if 'data_preprocessor' in cfg:
        node.setdefault('data_preprocessor', cfg.data_preprocessor)
    if state is None:
        forget_pretrained(node)
    model = MODELS.build(node)
    if state is None:
        model.init_weights()
    else:
        check_match(model, state, checkpoint)
        model.load_state_dict(state['state_dict'])
    model.eval()
    return model


def test_pictures(cfg: Config) -> str:
    """The folder of the config's test set."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset.dataset
    prefix = dataset.get('data_prefix') or {}
    if not isinstance(prefix, dict):
        prefix = dict(img=prefix)
    folder = os.path.join(
        dataset.get('data_root') or '',
        prefix.get('img') or prefix.get('img_path') or '',
    )
    if not os.path.isdir(folder):
        raise InputError(
            f"the config's test set {folder!r} is not there; give --images"
        )
    nested = sorted(e.path for e in os.scandir(folder) if e.is_dir())
    return nested[0] if nested else folder


def preprocessed(cfg: Config, model: nn.Module, files: List[str]) -> Iterator[Tensor]:
    """What the model sees of these pictures when it is tested."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    pipeline = Compose(
        [step for step in dataset.pipeline if 'Annotations' not in type_name(step)]
    )
    for file in files:
        check_picture(file)
        data = pipeline(dict(img_path=file, img_id=0, reduce_zero_label=False))
        batch = model.data_preprocessor(pseudo_collate([data]), False)
        yield batch['inputs']


def summary(report: List[Folding]) -> str:
    """What was folded of what is exported."""
    norms = [f for f in report if f.norm and f.note != UNUSED]
    kept = [f for f in norms if not f.conv]
    text = f'folded {len(norms) - len(kept)} of {len(norms)} norms, '
    if kept:
        text += f'kept an affine before the others ({kept[0].norm}: '
        text += f'{kept[0].note}), '
    return text


def main() -> None:
    args = parse_args()
    # torch's exporters and mmdet have much to say about what is traced
    warnings.simplefilter('ignore')
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    console = Console()
    with one_line_errors(args.config):
        check_arguments(args)
        cfg = load_config(args)
        MMLogger.get_current_instance().setLevel('ERROR')
        model = build(cfg, args.checkpoint)
        deployed = Deployed(model, args.part)
        files = find_pictures(args.images or test_pictures(cfg))[: args.count]
        with console.status('reading pictures'), torch.no_grad():
            pictures = list(preprocessed(cfg, model, files))
        sizes = sorted(tuple(p.shape[2:]) for p in pictures)
        # the smallest and its mirror image: an example of a variable batch
        small = min(pictures, key=lambda p: p.shape[2:].numel())
        example = torch.cat((small, small.flip(3)))
        written = deployed
        text = ''
        if args.fold:
            report = []
            with console.status('folding'):
                written = fold(deployed, example, report=report)
            text = summary(report)
        with replacing(args.out) as draft:
            with console.status(f'exporting ({args.exporter})'):
                export_onnx(written, draft, example, args.exporter, args.opset)
            with console.status(f'checking on {len(pictures)} pictures'):
                worst = onnx_difference(draft, deployed, [*pictures, example])
            if not worst <= args.tolerance:
                raise InputError(
                    f'onnxruntime differs from PyTorch by {worst:.1e} of the '
                    f'largest value, more than --tolerance {args.tolerance}; '
                    f'nothing was written'
                )
    between = ' to '.join(dict.fromkeys(f'{h}x{w}' for h, w in (sizes[0], sizes[-1])))
    console.print(
        f'Wrote {args.out}: {text}largest relative difference to PyTorch '
        f'{worst:.1e} on {len(files)} pictures of {between}',
        soft_wrap=True,
        highlight=False,
    )


if __name__ == '__main__':
    main()
