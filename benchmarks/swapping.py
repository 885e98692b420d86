"""Models whose norms and convolutions are swapped for others."""

from typing import Optional

from mmengine.config import Config, ConfigDict

from bcn_mm.convert import to_bcn, walk
from bcn_mm.engine.cli import forget_pretrained
from bcn_mm.errors import InputError


def swap(cfg: Config, norm_cfg: dict, conv_cfg: Optional[dict]) -> ConfigDict:
    """The model of a config with other norms, from random weights."""
    model = to_bcn(cfg, ws=True).model
    nodes = [node for _, node in walk(model)]
    norms = [node for node in nodes if node.get('type') in ('BCN', 'SyncBCN')]
    if not norms:
        raise InputError(
            f'the model of {cfg.filename} has no BatchNorm, GroupNorm or BCN: '
            f'there is nothing to swap'
        )
    for node in nodes:
        if node.get('type') == 'WithBCN' and norm_cfg['type'] != 'BCN':
            node.type = node.pop('component')
            node.pop('bcn_cfg')
        elif (node.get('conv_cfg') or {}).get('type') == 'WSConv2d':
            node.conv_cfg = conv_cfg and ConfigDict(conv_cfg)
    for norm in norms:
        norm.clear()
        norm.update(norm_cfg)
    forget_pretrained(model)
    return model
