"""The norms that are compared, and arguments of theirs."""

from contextlib import suppress
from typing import Mapping, NamedTuple, Optional

import yaml

from bcn_mm.errors import InputError


class Norm(NamedTuple):
    """A norm, and the convolution before it."""

    title: str
    norm_cfg: dict
    conv_cfg: Optional[dict]
    colour: str
    #: What a task makes of it beside the layer, see :data:`SETTINGS`.
    settings: Mapping[str, object] = {}


#: Options of a norm that are no arguments of the layer; a task says which it
#: heeds (``Task.settings``).
SETTINGS = ('follow_lr', 'frozen', 'reading', 'warmup', 'windows')

# 16 groups: layers have 32 channels or more. 32 are better on some data.
_GN, _WS = dict(type='GN', num_groups=16), dict(type='WSConv2d')
#: From random weights.
NORMS = {
    'bn': Norm('BN', dict(type='BN'), None, 'tab:red'),
    'ln': Norm('LN', dict(type='GN', num_groups=1), None, 'tab:brown'),
    'in': Norm('IN', dict(type='IN', affine=True), None, 'tab:pink'),
    'gn': Norm('GN', _GN, None, 'tab:olive'),
    'gn-ws': Norm('GN + WS', _GN, _WS, 'tab:green'),
    'bcn': Norm('BCN', dict(type='BCN'), None, 'tab:cyan'),
    'bcn-ws': Norm('BCN + WS', dict(type='BCN'), _WS, 'tab:blue'),
}
#: In the place of a trained network's BatchNorms.
PLACED = {
    'bn-frozen': Norm('BN, frozen', dict(type='BN'), None, 'tab:gray'),
    'bn-trained': Norm('BN in training mode', dict(type='BN'), None, 'tab:red'),
    'gn-placed': Norm("GN in BN's place", dict(type='GN'), None, 'tab:olive'),
    'bcn-read': Norm('BCN from BN weights', dict(type='BCN'), None, 'tab:blue'),
    'bcn-random': Norm('BCN, random weights', dict(type='BCN'), None, 'tab:cyan'),
}
#: All, in the order in which they are shown.
NAMES = (*NORMS, *PLACED)


def parse_norm(text: str) -> Norm:
    """``bcn-ws,momentum=0.1`` -> the norm with that argument."""
    name, *options = text.split(',')
    norm = {**NORMS, **PLACED}.get(name)
    if not norm:
        raise InputError(
            f'norm {name!r} is not one of {", ".join(NAMES)} (arguments of '
            f'the layer follow behind a comma: bcn-ws,momentum=0.1)'
        )
    pairs = [option.partition('=') for option in options]
    if not all(key and sign and value for key, sign, value in pairs):
        raise InputError(f'norm {text!r}: arguments look like momentum=0.1')
    more = {key: _value(value) for key, _, value in pairs}
    if len(more) < len(pairs):
        raise InputError(f'norm {text!r}: an argument is given twice')
    title = ', '.join([norm.title, *(_said(*pair) for pair in more.items())])
    settings = {key: more.pop(key) for key in SETTINGS if key in more}
    norm_cfg = {**norm.norm_cfg, **more}
    return norm._replace(title=title, norm_cfg=norm_cfg, settings=settings)


def _value(text: str) -> object:
    """As YAML has it, but for numbers and a None as Python writes them."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    if text == 'None':
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f'norm: {text!r} is no value of an argument') from None


def _said(key: str, value: object) -> str:
    return (
        'early stages frozen' if (key, value) == ('frozen', True) else f'{key} {value}'
    )
