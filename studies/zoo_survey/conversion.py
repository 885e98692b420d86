"""The models of a config before and after its conversion."""

import tempfile
from typing import Dict

from mmengine.config import Config
from torch import nn

from bcn_mm import BCN
from bcn_mm.convert import (
    build_model,
    describe,
    in_scope,
    leftovers,
    scope_of,
    to_bcn,
    write_config,
)

from .workers import limit, quiet
from .zoo import PACKAGES, path_of, read

# The last comparison, by what it depends on.
_seen: Dict[str, dict] = {}


def look_at(name: str, ws: bool, timeout: int) -> dict:
    """Build the stock and the converted model of one config."""
    result = {}
    with quiet(name), limit(timeout):
        try:
            cfg = read(name)
            if 'model' not in cfg:
                return dict(skipped='no model')
            if scope_of(cfg) not in PACKAGES:
                return dict(skipped='of another scope')
            key = repr((scope_of(cfg), cfg.model.to_dict(), ws))
            if key not in _seen:
                _seen.clear()  # neighbours are alike, others are not
                _seen[key] = _compare(cfg, name, ws)
            result.update(_seen[key])
        except Exception as e:
            result['stock_error'] = describe(e)
    return result


def _compare(cfg: Config, name: str, ws: bool) -> dict:
    try:
        model = _build(cfg)
    except Exception as e:
        return dict(stock_error=describe(e))
    result = dict(
        stock=_counts(model),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    try:
        changes = []
        new = to_bcn(cfg, ws=ws, changes=changes)
        result['levels'] = sorted(
            {c.after for c in changes if c.path.endswith('num_levels')}
        )
        result['notes'] = sorted(
            {c.note for c in changes if c.before == c.after and c.note}
        )
        source = path_of(name)
        with tempfile.TemporaryDirectory() as folder:
            write_config(
                to_bcn(Config.fromfile(source), ws=ws), source, f'{folder}/config.py'
            )
        if to_bcn(new, ws=ws).to_dict() != new.to_dict():
            raise AssertionError('a second conversion changed something')
        model = _build(new)
        result['converted'] = _counts(model)
        result['left'] = {
            where: kind for kind, names in leftovers(model).items() for where in names
        }
    except Exception as e:
        result['error'] = describe(e)
    return result


def _build(cfg: Config) -> nn.Module:
    """The model of a config, without values where that is possible."""
    with in_scope(cfg) as registry:
        return build_model(cfg.model, registry)


def _counts(model: nn.Module) -> Dict[str, int]:
    """How many norms there are, by kind."""
    found = {kind: len(names) for kind, names in leftovers(model).items()}
    replaced = sum(isinstance(m, BCN) for m in model.modules())
    return dict(found, BCN=replaced) if replaced else found
