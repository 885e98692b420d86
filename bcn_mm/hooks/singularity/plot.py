"""The heat map of a run."""

import re
from typing import Dict, Iterable, List, Sequence

import numpy as np

from ..._files import replacing
from .statistics import PREFIX, History

# At the end of a layer's name.
_ABBREVIATION = re.compile(r'\b[bg]n(?=\d*/)')


def draw_history(runs: Dict[str, History], path: str) -> None:
    """Draw a heat map of layers by steps: lowest margins and dead channels.

    Args:
        runs (dict): What each run logged, by a name that goes above its
            panels. One run has its two panels side by side, several have one
            column each, with layers that differ in mmcv's abbreviation of the
            norm only (``gn1``, ``bn1``) in one row, as ``norm1``.
        path (str): The PNG, written beside its target and moved there.
    """
    # here, since few who import bcn_mm draw, and not pyplot, which has a state
    # and a back end of the user's
    from matplotlib.figure import Figure

    if len(runs) > 1:
        runs = {
            name: [
                (step, {_ABBREVIATION.sub('norm', k): v for k, v in t.items()})
                for step, t in history
            ]
            for name, history in runs.items()
        }
    layers = {}
    for history in runs.values():
        for _, tags in history:
            layers.update(dict.fromkeys(_layers_of(tags)))
    layers = list(layers)
    steps = {name: [step for step, _ in h] for name, h in runs.items()}
    lowest = {k: _grid(h, layers, 'margin_min') for k, h in runs.items()}
    dead = {k: 100 * _grid(h, layers, 'dead') for k, h in runs.items()}
    panels = (
        (
            lowest,
            'lowest margin of a channel',
            'mean / std of its pre-activation',
            dict(cmap='inferno', vmin=-5, vmax=0),
            'both',
        ),
        (
            dead,
            'dead channels',
            "% of the layer's",
            dict(cmap='inferno_r', vmin=0, vmax=_ceiling(dead.values())),
            'neither',
        ),
    )
    one = len(runs) == 1
    height = 1.3 + 0.15 * max(len(layers), 6)
    figure = Figure(
        figsize=(max(9, 3 + 2 * len(runs)), height if one else 2 * height),
        layout='constrained',
    )
    axes = figure.subplots(
        *((1, 2) if one else (2, len(runs))),
        sharey=True,
        squeeze=False,
    )
    axes = axes.reshape(2, len(runs))
    for row, (values, title, unit, colours, extend) in zip(axes, panels):
        for axis, (name, grid) in zip(row, values.items()):
            axis.set_facecolor('lightgrey')
            mesh = axis.pcolormesh(
                _edges(steps[name]),
                range(len(layers) + 1),
                grid,
                rasterized=True,
                **colours,
            )
            axis.set_title(title if one else name, fontsize='medium')
            axis.set_xlabel('training step')
        bar = figure.colorbar(
            mesh, ax=list(row), extend=extend, fraction=0.05, pad=0.02
        )
        bar.set_label(unit if one else f'{title}\n({unit})')
        row[0].set_yticks([i + 0.5 for i in range(len(layers))], layers, fontsize=7)
    axes[0, 0].set_ylim(len(layers), 0)  # the first layer on top
    if any(np.isnan(grid).any() for grid in dead.values()):
        figure.supxlabel('grey: not measured', fontsize='small', color='grey')
    with replacing(path, '.part.png') as draft:
        figure.savefig(draft, dpi=100)


def _layers_of(tags: Dict[str, float]) -> List[str]:
    """The layers' names among the names of scalars, in their order."""
    ending = '/dead'
    return [
        tag[len(PREFIX) : -len(ending)]
        for tag in tags
        if tag.endswith(ending) and tag != PREFIX + ending[1:]
    ]


def _grid(history: History, layers: Sequence[str], key: str) -> np.ndarray:
    """(layers, steps), NaN where a layer was not measured."""
    return np.array(
        [
            [tags.get(f'{PREFIX}{name}/{key}', np.nan) for _, tags in history]
            for name in layers
        ]
    )


def _edges(steps: Sequence[int]) -> List[float]:
    """Where cells that end at ``steps`` begin and end."""
    width = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    return [steps[0] - width, *steps]


def _ceiling(grids: Iterable[np.ndarray]) -> float:
    """The largest percentage, 1 at least."""
    return max(1, *(np.nanmax(grid) for grid in grids))
