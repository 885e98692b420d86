"""Write a small data set of shapes on textured backgrounds.

Two views of the same pictures: instance polygons in COCO's layout, and label
maps (0 background, 1 circle, 2 square, 3 triangle) for segmentation.

    ROOT/annotations/instances_{train,val}.json
    ROOT/{train,val}/000000.jpg, ...
    ROOT/labels/{train,val}/000000.png, ...
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

CLASSES = ('circle', 'square', 'triangle')
# The share of a shape that later ones may hide before it is left out.
MIN_VISIBLE = 0.4
# Pixels of the smallest piece that an instance may have.
MIN_PIECE = 20


def texture(rng: np.random.Generator, size: int, strength: float) -> np.ndarray:
    """A random colour with noise on three scales, (size, size, 3) float."""
    picture = np.full((size, size, 3), rng.uniform(40, 215, 3), np.float32)
    for cells, share in ((4, 1), (20, 0.5), (size, 0.25)):
        noise = rng.normal(0, share * strength, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return picture


def outline(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """The polygon of a shape of random place, size and slight turn, (K, 2)."""
    radius = rng.uniform(0.10, 0.22) * size
    centre = rng.uniform(radius, size - radius, 2)
    corners, upright = ((40, 0), (4, np.pi / 4), (3, -np.pi / 2))[kind]
    angles = upright + rng.uniform(-0.3, 0.3)
    angles = angles + np.arange(corners) * 2 * np.pi / corners
    polygon = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.clip(polygon, 0, size - 1)


def scene(rng: np.random.Generator, size: int):
    """One picture, its label map, and its instances as (class, mask)."""
    picture = texture(rng, size, 25)
    labels = np.zeros((size, size), np.uint8)
    drawn = []
    for _ in range(rng.integers(1, 6)):
        kind = int(rng.integers(len(CLASSES)))
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [np.round(outline(rng, kind, size)).astype(int)], 1)
        alone = mask.sum()
        if any((m & ~mask).sum() < MIN_VISIBLE * area for _, m, area in drawn):
            continue
        drawn = [(k, m & ~mask, area) for k, m, area in drawn]
        drawn.append((kind, mask, alone))
        picture = np.where(mask[..., None] == 1, texture(rng, size, 8), picture)
        labels[mask == 1] = kind + 1
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    return picture, labels, [(k, without_slivers(m)) for k, m, _ in drawn]


def without_slivers(mask: np.ndarray) -> np.ndarray:
    """The mask without what occlusion left of it in tiny pieces."""
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask)
    large = stats[:, cv2.CC_STAT_AREA] >= MIN_PIECE
    return mask * large[pieces].astype(np.uint8)


def polygons(mask: np.ndarray) -> list:
    """The mask's outer contours, in COCO's flat form.

    They run through pixel centres, which COCO puts at halves.
    """
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [(c.flatten() + 0.5).tolist() for c in contours]


def write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng([seed, split == 'val'])
    (root / split).mkdir()
    (root / 'labels' / split).mkdir(parents=True)
    images, annotations = [], []
    for index in track(range(count), f'drawing {split}'):
        picture, labels, instances = scene(rng, size)
        name = f'{index:06d}.jpg'
        cv2.imwrite(str(root / split / name), picture)
        cv2.imwrite(str(root / 'labels' / split / f'{index:06d}.png'), labels)
        images.append(dict(id=index, file_name=name, width=size, height=size))
        for kind, mask in instances:
            if not mask.any():  # of small pictures
                continue
            outlines = polygons(mask)
            points = np.concatenate(outlines).reshape(-1, 2)
            corner, size_xy = points.min(0), np.ptp(points, axis=0)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=kind + 1,
                    segmentation=outlines,
                    area=int(mask.sum()),
                    bbox=[*corner.tolist(), *size_xy.tolist()],
                    iscrowd=0,
                )
            )
    categories = [dict(id=i + 1, name=n) for i, n in enumerate(CLASSES)]
    target = root / 'annotations' / f'instances_{split}.json'
    target.parent.mkdir(exist_ok=True)
    target.write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )


def make_shapes(
    root: Path,
    train: int = 400,
    val: int = 100,
    size: int = 160,
    seed: int = 0,
) -> bool:
    """Write the data set unless one of the same arguments is there.

    It is written beside ``root`` and moved into place when complete.

    Args:
        root (Path): The folder to make.
        train (int): How many training pictures.
        val (int): How many validation pictures.
        size (int): Their side in pixels.
        seed (int): Equal seeds give equal pictures.

    Returns:
        bool: Whether anything was written.

    Raises:
        FileExistsError: if ``root`` holds something else.
        ValueError: if a number is too small.
    """
    root = Path(root)
    if min(train, val) < 1 or size < 32:
        raise ValueError(
            f'--train {train}, --val {val} and --size {size}: at least one picture '
            f'each, of 32 pixels'
        )
    arguments = dict(train=train, val=val, size=size, seed=seed)
    stamp = root / 'shapes.json'
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is a file; choose a folder')
    if root.exists() and any(root.iterdir()):
        if stamp.exists() and json.loads(stamp.read_text()) == arguments:
            return False
        raise FileExistsError(
            f'{root} exists but holds something else; remove it or choose '
            f'another folder'
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        draft = Path(folder) / root.name
        draft.mkdir()
        for split, count in (('train', train), ('val', val)):
            write_split(draft, split, count, size, seed)
        (draft / stamp.name).write_text(json.dumps(arguments))
        if root.exists():
            root.rmdir()
        shutil.move(os.fspath(draft), os.fspath(root))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('root', type=Path, help='the folder to make')
    parser.add_argument(
        '--train',
        type=int,
        default=400,
        help='training pictures (%(default)s)',
    )
    parser.add_argument(
        '--val',
        type=int,
        default=100,
        help='validation pictures (%(default)s)',
    )
    parser.add_argument(
        '--size', type=int, default=160, help='side in pixels (%(default)s)'
    )
    parser.add_argument('--seed', type=int, default=0, help='(%(default)s)')
    args = parser.parse_args()
    try:
        written = make_shapes(**vars(args))
    except (ValueError, OSError) as e:
        parser.exit(1, f'error: {e}\n')
    print(f'{args.root}: {"written" if written else "already there"}')


if __name__ == '__main__':
    main()
