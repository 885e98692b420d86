"""What a window's calls say of every layer, over all ranks."""

from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from ...layers import BCN
from .measure import Measurement

#: What every logged scalar's name begins with.
PREFIX = 'singularity/'
#: A run's scalars: pairs of a step and what was logged then.
History = List[Tuple[int, Dict[str, float]]]

# Margins are cut off here: a channel without variance has an infinite one.
_LIMIT = 100.0


class Sums(NamedTuple):
    """Over the calls of a norm that count, of a rank or of all; in float64.

    Attributes:
        calls (Tensor): How many there are, a scalar.
        outputs (Tensor): (4, C): weight, positives, and the first and second
            moment of the output, times weight.
        inputs (Tensor, optional): Of a BCN, (5, num_levels, C): weight, and
            these moments of the input and of the estimate, times weight.
    """

    calls: Tensor
    outputs: Tensor
    inputs: Optional[Tensor] = None


def sum_up(norm: nn.Module, calls: Sequence[Measurement]) -> Sums:
    """This rank's sums over some calls of a norm.

    Here alone the device is waited for.

    Args:
        norm (nn.Module): The norm, with the estimates to compare with.
        calls (Sequence[Measurement]): What its calls left behind.

    Returns:
        Sums: this rank's.
    """
    channels = getattr(norm, 'num_features', None) or norm.num_channels
    outputs = torch.zeros(4, channels, dtype=torch.float64)
    inputs = None
    if isinstance(norm, BCN):
        inputs = outputs.new_zeros(5, norm.num_levels, channels)
        estimates = [
            t.detach().double().cpu().view(norm.num_levels, -1)
            for t in (norm.running_mean, norm.running_var)
        ]
    if calls:
        rows = torch.stack([call.rows for call in calls]).double().cpu()
    for call, (mean, var, positive, *own) in zip(calls, rows if calls else ()):
        weight = torch.full_like(mean, call.num_positions)
        weight, first, second = _weighted_moments(weight, mean, var)
        positive = torch.where(weight > 0, positive, 0)
        outputs += torch.stack((weight, positive, first, second))
        if own:
            weight, first, second = _weighted_moments(torch.ones_like(mean), *own)
            mu, sigma2 = (t[call.level] for t in estimates)
            inputs[:, call.level] += torch.stack(
                (
                    *(weight, first, second),
                    *(weight * mu, weight * (sigma2 + mu**2)),
                )
            )
    return Sums(outputs.new_tensor(float(len(calls))), outputs, inputs)


def _weighted_moments(weight: Tensor, mean: Tensor, var: Tensor) -> List[Tensor]:
    """What makes moments additive; nothing of channels that are not finite."""
    ok = mean.isfinite() & var.isfinite()
    weight = weight * ok
    mean, var = (torch.where(ok, t, 0) for t in (mean, var))
    return [weight, weight * mean, weight * (var + mean**2)]


def over_ranks(sums: Sequence[Sums]) -> List[Sums]:
    """Add up the sums of all ranks, in one message.

    Args:
        sums (Sequence[Sums]): This rank's, of all norms.

    Returns:
        list[Sums]: those of all ranks, of the same norms.
    """
    tensors = [t for layer in sums for t in layer if t is not None]
    flat = torch.cat([t.flatten() for t in tensors])
    all_reduce(flat)
    parts = iter(flat.split([t.numel() for t in tensors]))
    return [
        Sums(*(next(parts).view(t.shape) for t in layer if t is not None))
        for layer in sums
    ]


def layer_result(sums: Sums, dead_below: float, near_below: float) -> dict:
    """A layer's result, as the hook keeps it.

    Args:
        sums (Sums): The layer's, of all ranks.
        dead_below (float): The activation rate below which a channel is dead.
        near_below (float): The margin below which one is near elimination.

    Returns:
        dict: one of the ``layers`` of
        :attr:`~bcn_mm.hooks.EliminationSingularityHook.results`.
    """
    count, positive, first, second = sums.outputs
    mean, std = first / count, (second / count - (first / count) ** 2)
    std = std.clamp_min(0).sqrt()
    margin = torch.where(mean == 0, mean, mean / std)
    margin = margin.clamp(-_LIMIT, _LIMIT)
    rate = positive / count
    dead = rate < dead_below
    near = dead | (margin < near_below)
    layer = dict(
        rate=rate,
        margin=margin,
        dead_channels=dead.nonzero().flatten().tolist(),
        near_channels=near.nonzero().flatten().tolist(),
    )
    if sums.inputs is not None:
        calls, *weighted = sums.inputs
        mean, second, estimate, estimate_second = (s / calls for s in weighted)
        var = (second - mean**2).clamp_min(0)
        layer['lag'] = (estimate - mean).abs() / var.sqrt()
        layer['var_ratio'] = (estimate_second - estimate**2) / var
    layer['scalars'] = scalars_of([layer])
    return layer


def scalars_of(layers: Sequence[dict]) -> Dict[str, float]:
    """The scalars of some layers together.

    Args:
        layers (Sequence[dict]): Results of layers.

    Returns:
        dict: ``dead``, ``near``, ``margin_min``, ``margin_median``, and where
        there are estimates ``lag``, ``lag_max``, ``var_ratio``.
    """
    margin = _finite(layers, 'margin')
    scalars = dict(
        dead=_count(layers, 'dead') / len(margin),
        near=_count(layers, 'near') / len(margin),
        margin_min=margin.min().item(),
        margin_median=margin.median().item(),
    )
    lag, ratio = _finite(layers, 'lag'), _finite(layers, 'var_ratio')
    if len(lag) and len(ratio):
        scalars.update(
            lag=lag.median().item(),
            lag_max=lag.max().item(),
            var_ratio=ratio.median().item(),
        )
    return scalars


def tags_of(results: dict) -> Dict[str, float]:
    """The scalars of a window by the names under which they are logged.

    Args:
        results (dict): The hook's.

    Returns:
        dict: the network's first, then every layer's in their order.
    """
    tags = {PREFIX + key: v for key, v in results['network'].items()}
    for name, layer in results['layers'].items():
        for key, value in layer['scalars'].items():
            tags[f'{PREFIX}{name}/{key}'] = value
    return tags


def log_line(results: dict, steps: int) -> str:
    """One line about the network.

    Args:
        results (dict): The hook's.
        steps (int): How many were measured.

    Returns:
        str: the line.
    """
    layers = results['layers'].values()
    network, step = results['network'], results['step']
    line = (
        f'Elimination singularities, steps {step - steps + 1} to '
        f'{step}: of {len(_finite(layers, "margin"))} channels '
        f'{_count(layers, "dead")} dead, '
        f'{_count(layers, "near")} near; '
        f'margin: lowest {network["margin_min"]:.2f}, '
        f'median {network["margin_median"]:.2f}'
    )
    if 'lag' in network:
        line += (
            f'; estimates: lag {network["lag"]:.2f}, '
            f'variance ratio {network["var_ratio"]:.2f}'
        )
    return line


def _count(layers: Iterable[dict], kind: str) -> int:
    """How many channels are ``'dead'`` or ``'near'``."""
    return sum(len(layer[f'{kind}_channels']) for layer in layers)


def _finite(layers: Iterable[dict], key: str) -> Tensor:
    """All finite values of some layers, flat."""
    values = [layer[key].flatten() for layer in layers if key in layer]
    values = torch.cat(values) if values else torch.empty(0)
    return values[values.isfinite()]
