"""How shapes are cut into the programs of Triton's kernels."""

import functools
import math
from typing import NamedTuple, Tuple

# Elements of a tile, and how many programs fill a card. On an H200 others took from
# 9% less time to twice as long, mostly longer (docs/notes/performance.md).
_TILE = 1024
_PROGRAMS = 1024
# Chunks of a row, and rows times chunks in a tile of the algebra, at most.
_CHUNKS = 256
_ROWS = 1024
_LAST_CHANNELS = 32  # channels in a tile, channels-last
_FILTER = 2048  # weights of a filter that are looked at together


class Plan(NamedTuple):
    """How a shape is cut into programs, and the arguments that say so.

    The last three of ``chunked`` and ``tiled`` are whether channels are what lies
    side by side in memory, and the channels and positions of a tile.
    """

    rows: int  # R = N C
    values: int  # N L
    half: int  # R S, S being the chunks of each row
    chunks: int  # S
    chunk_programs: int
    chunked: Tuple[int, int, int, int, bool, int, int]  # C, L, S, chunk, ...
    tile_programs: int
    tiled: Tuple[int, int, int, bool, int, int]  # C, L, tiles of each row, ...


class GroupPlan(NamedTuple):
    """The same of the algebra, which a group is a program in."""

    sizes: Tuple[int, ...]  # half, N, R, C, D, L, S, chunk
    tile: Tuple[int, int, int]  # BN samples by BD channels by BS chunks


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def plan(n: int, c: int, length: int, last: bool) -> Plan:
    """Cut (N, C, L), channels-last or not, into tiles and chunks."""
    if last:
        br = min(_power(c), _LAST_CHANNELS)
        bl = min(_power(length), _TILE // br)
    else:
        bl = min(_power(length), _TILE)
        br = min(_power(c), _TILE // bl)
    blocks, tiles = n * ceil_div(c, br), ceil_div(length, bl)
    chunks = min(tiles, _CHUNKS, ceil_div(_PROGRAMS, blocks))
    chunk = ceil_div(tiles, chunks) * bl
    chunks = ceil_div(length, chunk)
    tile = last, br, bl
    return Plan(
        n * c,
        n * length,
        n * c * chunks,
        chunks,
        blocks * chunks,
        (c, length, chunks, chunk, *tile),
        blocks * tiles,
        (c, length, tiles, *tile),
    )


@functools.lru_cache(maxsize=4096)
def group_plan(cut: Plan, depth: int) -> GroupPlan:
    """Cut a group of N samples by D channels into tiles of rows."""
    c, length, chunks, chunk = cut.chunked[:4]
    n, bs = cut.rows // c, _power(chunks)
    bd = min(_power(depth), 64, max(1, _ROWS // bs))
    bn = min(_power(n), 256, max(1, _ROWS // (bs * bd)))
    sizes = cut.half, n, cut.rows, c, depth, length, chunks, chunk
    return GroupPlan(sizes, (bn, bd, bs))


@functools.lru_cache(maxsize=4096)
def filter_plan(out: int, *fan: int) -> Tuple[int, int, int]:
    """Of a weight: its filters, the weights of each, and how many are a tile."""
    size = math.prod(fan)
    return out, size, min(_power(size), _FILTER)
