"""The norms that are compared, and arguments of theirs."""

from typing import NamedTuple, Optional

import yaml

from bcn_mm.errors import InputError


class Norm(NamedTuple):
    """A norm, and the convolution before it."""

    title: str
    norm_cfg: dict
    conv_cfg: Optional[dict]
    colour: str
    follow_lr: bool = False  # scale its momentum as the learning rate


# 16 groups, as in the quickstart's configs: layers have 32 channels or more
_GN, _WS = dict(type='GN', num_groups=16), dict(type='WSConv2d')
NORMS = {
    'bn': Norm('BN', dict(type='BN'), None, 'tab:red'),
    'ln': Norm('LN', dict(type='GN', num_groups=1), None, 'tab:brown'),
    'in': Norm('IN', dict(type='IN', affine=True), None, 'tab:pink'),
    'gn': Norm('GN', _GN, None, 'tab:olive'),
    'gn-ws': Norm('GN + WS', _GN, _WS, 'tab:green'),
    'bcn': Norm('BCN', dict(type='BCN'), None, 'tab:cyan'),
    'bcn-ws': Norm('BCN + WS', dict(type='BCN'), _WS, 'tab:blue'),
}


def parse_norm(text: str) -> Norm:
    """``bcn-ws,momentum=0.1`` -> the norm with that argument."""
    name, *options = text.split(',')
    if name not in NORMS:
        raise InputError(
            f'norm {name!r} is not one of {", ".join(NORMS)} (arguments of '
            f'the layer follow behind a comma: bcn-ws,momentum=0.1)'
        )
    norm = NORMS[name]
    pairs = [option.partition('=') for option in options]
    if not all(key and sign and value for key, sign, value in pairs):
        raise InputError(f'norm {text!r}: arguments look like momentum=0.1')
    more = {key: yaml.safe_load(value) for key, _, value in pairs}
    title = ', '.join([norm.title, *(f'{k} {v}' for k, v in more.items())])
    follow = bool(more.pop('follow_lr', False))
    norm_cfg = {**norm.norm_cfg, **more}
    return norm._replace(title=title, norm_cfg=norm_cfg, follow_lr=follow)
