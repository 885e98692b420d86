"""BCN over several ranks: in every pass, or from time to time."""

from typing import Any, Iterable, Optional

import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import Tensor, nn

from .bcn import BCN


@MODELS.register_module()
class SyncBCN(BCN):
    """:class:`BCN` with ``sync=True``, ``norm_cfg=dict(type='SyncBCN')``."""

    def __init__(self, *args: Any, sync: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, sync=sync, **kwargs)


def convert_sync_bcn(
    module: nn.Module, process_group: Optional['dist.ProcessGroup'] = None
) -> nn.Module:
    """Make every BCN in a model take its batch statistics over all ranks.

    Args:
        module (nn.Module): Changed in place.
        process_group (ProcessGroup, optional): Of those ranks. Default: all.

    Returns:
        nn.Module: ``module``.
    """
    return _set_sync(module, True, process_group)


def revert_sync_bcn(module: nn.Module) -> nn.Module:
    """Make every BCN in a model, SyncBCN included, keep its own statistics."""
    return _set_sync(module, False, None)


def _set_sync(
    module: nn.Module, sync: bool, process_group: Optional['dist.ProcessGroup']
) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, BCN):
            layer.sync, layer.process_group = sync, process_group
    return module


@torch.no_grad()
def average_estimates(
    module: nn.Module, process_group: Optional['dist.ProcessGroup'] = None
) -> None:
    r"""Make the estimates of every BCN in a model equal on all ranks.

    With :math:`n_k` the training passes that rank k has seen, the mean is
    :math:`\bar\mu = \sum n_k \mu_k / \sum n_k` and the variance that of the
    mixture, :math:`\sum n_k (\sigma_k^2 + (\mu_k - \bar\mu)^2) / \sum n_k`;
    ``num_batches_tracked`` becomes the mean, rounded. Where no rank has seen
    any, all weigh the same; pyramid levels are averaged each for itself.
    Estimates that agree already stay as they are. Two ``all_reduce`` of 3 C
    float64 numbers together for all layers, on the device of the first; every
    rank must call it. Without effect in a single process.

    Args:
        module (nn.Module): Changed in place.
        process_group (ProcessGroup, optional): Of the ranks. Default: all.
    """
    layers = [m for m in module.modules() if isinstance(m, BCN)]
    if not (layers and dist.is_available() and dist.is_initialized()):
        return
    ranks = dist.get_world_size(process_group)
    if ranks < 2:
        return
    means = [layer.running_mean for layer in layers]
    variances = [layer.running_var for layer in layers]
    passes = [layer.num_batches_tracked.unsqueeze(-1) for layer in layers]

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        # a copy of a model may be on another device
        return torch.cat(
            [t.to(means[0].device, torch.float64).flatten() for t in tensors]
        )

    own, var = flat(means), flat(variances)
    # a rank without a pass weighs nothing beside others, but as much as they
    # do if they have none either
    weight = flat(n.expand_as(m) for n, m in zip(passes, means))
    weight = weight.clamp_min(2.0**-500)
    sums = torch.stack((weight, weight * own))
    dist.all_reduce(sums, group=process_group)
    total, mean = sums[0], sums[1] / sums[0]
    # about the common mean: a difference of moments cancels where it is large
    var = weight * (var + (own - mean).square())
    dist.all_reduce(var, group=process_group)
    sizes = [m.numel() for m in means]
    for buffers, values in ((means, mean), (variances, var / total)):
        for buffer, value in zip(buffers, values.split(sizes)):
            buffer.copy_(value.view_as(buffer))
    for n, value in zip(passes, (total / ranks).round().split(sizes)):
        n.copy_(value.view(*n.shape[:-1], -1)[..., :1])
