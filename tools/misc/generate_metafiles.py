"""Write what follows from the recipes in configs/: model-index.yml, the metafile
of every folder that has a README, and the tables of recipes in that README.

A table stands between `<!-- recipes: DATA -->` and `<!-- end of recipes -->`.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import yaml
from mmengine.config import Config

from bcn_mm.convert.tree import walk

ROOT = Path(__file__).resolve().parents[2]
# type of the training set -> its name
DATA = {
    'CocoDataset': 'COCO',
    'CityscapesDataset': 'Cityscapes',
    'PascalVOCDataset': 'Pascal VOC 2012 + Aug',
    'ImageNet': 'ImageNet-1k',
}
# in the order of a table
NORMS = (
    'BCN + WS',
    'SyncBCN + WS',
    'BCN',
    'GN + WS',
    'GN',
    'SyncBN',
    'BN',
    'BN, frozen',
)
BACKBONES = ('R50', 'R101', 'X50-32x4d')
PAPER = dict(
    URL='https://arxiv.org/abs/1911.09738',
    Title='Rethinking Normalization and Elimination Singularity in Neural Networks',
)
METHOD = ['Batch-Channel Normalization', 'Weight Standardization']


class Recipe(NamedTuple):
    """What a recipe's resolved config says."""

    path: Path
    data: str
    norm: str
    backbone: str
    epochs: Optional[int]
    iterations: Optional[int]
    crop: Optional[str]
    gpus: int
    images: int  # per GPU

    @property
    def schedule(self) -> str:
        if self.epochs is None:
            return f'{self.iterations:,} iterations'
        return f'{self.epochs} epochs'


def read(path: Path) -> Recipe:
    """Read a recipe."""
    cfg = Config.fromfile(path)
    backbone, loop = cfg.model.backbone, cfg.train_cfg
    images = cfg.train_dataloader.batch_size
    kinds, passes = set(), 1
    for _, node in walk(cfg.train_dataloader.dataset):
        kinds.add(node.get('type'))
        passes *= node.get('times', 1)  # a repeated data set
    (data,) = (DATA[kind] for kind in kinds & set(DATA))
    epochs = loop.get('max_epochs')
    crop = cfg.model.get('data_preprocessor', {}).get('size')
    return Recipe(
        path=path,
        data=data,
        norm=norm_of(backbone),
        backbone=name_of(backbone),
        epochs=epochs and epochs * passes,
        iterations=loop.get('max_iters'),
        crop=crop and '{}x{}'.format(*crop),
        gpus=cfg.auto_scale_lr.base_batch_size // images,
        images=images,
    )


def norm_of(backbone: dict) -> str:
    """The norm and the convolution of a backbone, as a table says them."""
    norm = backbone.get('norm_cfg', dict(type='BN'))['type']
    if norm == 'BN' and backbone.get('norm_eval'):
        return 'BN, frozen'
    conv = (backbone.get('conv_cfg') or {}).get('type')
    return f'{norm} + WS' if conv in ('WSConv2d', 'ConvWS') else norm


def name_of(backbone: dict) -> str:
    """A backbone's usual abbreviation."""
    if backbone['type'] == 'ResNeXt':
        width = f'{backbone["groups"]}x{backbone["base_width"]}d'
        return f'X{backbone["depth"]}-{width}'
    return f'R{backbone["depth"]}'


def in_order(recipes: Sequence[Recipe]) -> List[Recipe]:
    """Recipes as a table has them."""
    return sorted(
        recipes,
        key=lambda r: (
            -r.images,
            r.epochs or r.iterations,
            r.crop or '',
            BACKBONES.index(r.backbone),
            NORMS.index(r.norm),
            len(r.path.stem),  # one that starts from other weights comes last
        ),
    )


def table(recipes: Sequence[Recipe]) -> str:
    """Recipes of one data set as a table."""
    columns = {
        'norm': [r.norm for r in recipes],
        'backbone': [r.backbone for r in recipes],
        'schedule': [r.schedule for r in recipes],
        'crop': [r.crop for r in recipes],
        'GPUs x images': [f'{r.gpus} x {r.images}' for r in recipes],
        'recipe': [f'[{r.path.stem}]({r.path.name})' for r in recipes],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = [list(columns), ['---'] * len(columns), *zip(*columns.values())]
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def readme(text: str, recipes: Sequence[Recipe]) -> str:
    """A README with its tables as they should be."""
    missing = {r.data for r in recipes}

    def replace(match: 're.Match') -> str:
        data = match.group(2)
        missing.discard(data)
        rows = table([r for r in recipes if r.data == data])
        return f'{match.group(1)}\n{rows}\n{match.group(3)}'

    text = re.sub(
        r'(<!-- recipes: (.+) -->\n)[^<]*(<!-- end of recipes -->)', replace, text
    )
    if missing:
        raise ValueError(f'there is no <!-- recipes: {missing.pop()} --> in the README')
    return text


def metafile(title: str, recipes: Sequence[Recipe]) -> str:
    """A folder's metafile, as OpenMMLab's model-index wants it."""
    folder = f'configs/{recipes[0].path.parent.name}'
    collection = f'BCN {title}'
    models = [
        {
            'Name': r.path.stem,
            'In Collection': collection,
            'Config': f'{folder}/{r.path.name}',
            'Metadata': {
                'Training Data': r.data,
                'Architecture': [r.backbone, *r.norm.split(' + ')],
                'Epochs' if r.epochs else 'Iterations': r.epochs or r.iterations,
                'Batch Size': r.gpus * r.images,
            },
        }
        for r in sorted(recipes, key=lambda r: r.path)
    ]
    collections = [
        {
            'Name': collection,
            'Metadata': {
                'Training Data': sorted({r.data for r in recipes}),
                'Architecture': METHOD,
            },
            'Paper': PAPER,
            'README': f'{folder}/README.md',
            'Code': 'bcn_mm/layers/bcn.py',
        }
    ]
    return as_yaml(dict(Collections=collections, Models=models))


def as_yaml(content: dict) -> str:
    by = '# Written by tools/misc/generate_metafiles.py.\n'
    return by + yaml.safe_dump(content, sort_keys=False, width=1000)


def files_of(folder: Path) -> Dict[Path, str]:
    """What the generated files of a folder should hold."""
    recipes = in_order([read(path) for path in folder.glob('*.py')])
    text = (folder / 'README.md').read_text()
    title = text.splitlines()[0].lstrip('# ')
    return {
        folder / 'README.md': readme(text, recipes),
        folder / 'metafile.yml': metafile(title, recipes),
    }


def folders() -> List[Path]:
    """The folders of recipes that have a metafile."""
    return sorted(path.parent for path in (ROOT / 'configs').glob('*/README.md'))


def model_index() -> Dict[Path, str]:
    """What model-index.yml should hold."""
    names = [f'configs/{folder.name}/metafile.yml' for folder in folders()]
    return {ROOT / 'model-index.yml': as_yaml(dict(Import=names))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'folder',
        nargs='*',
        help='write the files of these folders of configs/ alone (default: all)',
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='write nothing; name the files that differ, with exit status 1 if any',
    )
    args = parser.parse_args()
    wanted = model_index()
    for folder in folders():
        if folder.name in args.folder or not args.folder:
            wanted.update(files_of(folder))
    differ = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text() != text
    ]
    for path in differ:
        print(path.relative_to(ROOT))
        if not args.check:
            path.write_text(wanted[path])
    sys.exit(1 if args.check and differ else 0)


if __name__ == '__main__':
    main()
