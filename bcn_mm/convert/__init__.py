"""Turning a stock config into a BCN config."""

from .components import (
    PARTS,
    Change,
    build_model,
    describe,
    difference,
    in_scope,
    leftovers,
    part_of,
    read_config,
    to_bcn,
    write_config,
)

__all__ = [
    'PARTS',
    'Change',
    'build_model',
    'describe',
    'difference',
    'in_scope',
    'leftovers',
    'part_of',
    'read_config',
    'to_bcn',
    'write_config',
]
