"""The passes on CUDA as kernels in Triton: three launches forward, three back.

What there is to launch is in triton_kernels.py and triton_stages.py; here it is
cut into programs and launched. The first time that a device and dtype come by,
the results are held against those of ordinary operators.
"""

import functools
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ContextManager, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .. import estimates, stages
from .._compat import increment_version
from ..stages import Affine, Batch, Moments, Spec, Sums
from .eager import Eager
from .trial import disagreement, said

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of a tile, and how many programs fill a card, by plain reasoning: no
# card was at hand to measure them on.
_TILE = 1024
_PROGRAMS = 1024
# Chunks of a row, and rows times chunks in a tile of the algebra, at most.
_CHUNKS = 256
_ROWS = 1024
_LAST_CHANNELS = 32  # channels in a tile, channels-last
# asked for, since what Triton does unasked is about to change
_OPTIONS = dict(num_warps=4, enable_fp_fusion=True)
_ALGEBRA = dict(num_warps=8, enable_fp_fusion=True)  # whose programs are few


class Plan(NamedTuple):
    """How a shape is cut into programs, and the arguments that say so.

    The last three of ``chunked`` and ``tiled`` are whether channels are what lies
    side by side in memory, and the channels and positions of a tile.
    """

    rows: int  # R = N C
    values: int  # N L
    half: int  # R S, S being the chunks of each row
    chunks: int  # S
    grid_of_chunks: Tuple[int]
    chunked: Tuple[int, int, int, int, bool, int, int]  # C, L, S, chunk, ...
    grid_of_tiles: Tuple[int]
    tiled: Tuple[int, int, int, bool, int, int]  # C, L, tiles of each row, ...


class GroupPlan(NamedTuple):
    """The same of the algebra, which a group is a program in."""

    sizes: Tuple[int, ...]  # half, N, R, C, D, L, S, chunk
    tile: Dict[str, int]  # in samples, channels and chunks


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _ceil(a: int, b: int) -> int:
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
    blocks, tiles = n * _ceil(c, br), _ceil(length, bl)
    chunks = min(tiles, _CHUNKS, _ceil(_PROGRAMS, blocks))
    chunk = _ceil(tiles, chunks) * bl
    chunks = _ceil(length, chunk)
    tile = last, br, bl
    return Plan(
        n * c,
        n * length,
        n * c * chunks,
        chunks,
        (blocks * chunks,),
        (c, length, chunks, chunk, *tile),
        (blocks * tiles,),
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
    return GroupPlan(sizes, dict(BN=bn, BD=bd, BS=bs))


def _plan_of(x: Tensor) -> Plan:
    n, c = x.shape[:2]
    length = x.shape[2:].numel()
    # rows of one value lie like channels-last
    return plan(n, c, length, length == 1 or not x.is_contiguous())


def _on_device_of(x: Tensor) -> ContextManager:
    """Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


class Triton(Eager):
    """Three launches forward and three back, statistics in float32."""

    fused = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objections: Dict[Tuple[torch.device, torch.dtype], str] = {}
        self._missing: Optional[str] = None  # unknown yet

    # -- whether to take it --------------------------------------------------

    def serves(self, x: Tensor) -> bool:
        return self._could(x) and not self.missing()

    def objection(self, x: Tensor) -> str:
        if not self._could(x):
            return ''
        if self.missing():
            return self.missing()
        key = x.device, x.dtype
        if key not in self._objections:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return (
                    'no pass was made before the capture of a CUDA graph, in which '
                    'the Triton kernels cannot be tried out'
                )
            with self._lock:
                if key not in self._objections:
                    self._objections[key] = disagreement(self, *key)
        return self._objections[key]

    @staticmethod
    def _could(x: Tensor) -> bool:
        # a subclass of Tensor may have no memory
        if x.dtype not in _DTYPES or type(x) not in (Tensor, nn.Parameter):
            return False
        return x.is_cuda or (x.device.type == 'cpu' and _interprets())

    def missing(self) -> str:
        """Why Triton cannot be imported; empty if it can."""
        if self._missing is None:
            try:
                _kernels()
                self._missing = ''
            except Exception as error:  # a broken one raises anything
                self._missing = f'Triton cannot be imported: {said(error)}'
        return self._missing

    # -- whole passes --------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        running: estimates.Running,
        rule: estimates.Rule,
        affine: Affine,
        spec: Spec,
        batch: Optional[Tensor] = None,
        repeats: bool = False,
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        cut, groups, kernels = _plan_of(x), spec.num_groups, _kernels()
        n, c = x.shape[:2]
        sizes, tile = group_plan(cut, c // groups)
        parts = x.new_empty(2 * cut.half + cut.rows, dtype=torch.float32)
        stats = x.new_empty(2 * cut.rows + 2 * c, dtype=torch.float32)
        coef = x.new_empty(2 * cut.rows, dtype=torch.float32)
        y = torch.empty_like(x)
        moves = rule.training and not repeats
        passes, start = _passes(x, running, rule) if moves else (None, 'identity')
        mean, var = running.mean.contiguous(), running.var.contiguous()
        unbiased = 1.0 if rule.estimate else cut.values / max(cut.values - 1, 1)
        # where estimates move, all samples of a group are one program's
        portion = n if moves else tile['BN']
        with _on_device_of(x):
            kernels.moments_kernel[cut.grid_of_chunks](
                x, parts, passes, cut.half, *cut.chunked, **_OPTIONS
            )
            tensors = mean, var, passes, *_contiguous(affine), batch
            numbers = portion, float(rule.momentum or 0), unbiased, float(rule.eps)
            how = moves, rule.estimate, start, repeats
            kernels.stages_kernel[(groups * _ceil(n, portion),)](
                parts, stats, coef, *tensors, *sizes, *numbers, *how, **tile, **_ALGEBRA
            )
            kernels.apply_kernel[cut.grid_of_tiles](
                x, y, stats, coef, cut.rows, *cut.tiled, spec.relu, **_OPTIONS
            )
        if moves:
            for buffer, moved in zip(running[:2], (mean, var)):
                if moved is not buffer:
                    buffer.copy_(moved)
            _written(*running)
        return y, (stats, coef) if spec.relu else (stats,)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Sequence[Tensor],
        affine: Affine,
        rule: estimates.Rule,
        spec: Spec,
        needs_dx: bool,
    ) -> Tuple[Optional[Tensor], Affine]:
        cut, groups, kernels = _plan_of(x), spec.num_groups, _kernels()
        (n, c), (sizes, tile) = x.shape[:2], group_plan(cut, x.shape[1] // groups)
        stats, gate = saved if spec.relu else (*saved, None)
        parts = x.new_empty(2 * cut.half, dtype=torch.float32)
        of_groups = x.new_empty(4 * n * groups, dtype=torch.float32)
        grads = x.new_empty(2 * c + 2 * groups, dtype=torch.float32)
        coef = x.new_empty(4 * cut.rows, dtype=torch.float32) if needs_dx else None
        dx = torch.empty_like(x) if needs_dx else None
        batch_weight, batch_bias, weight, _ = parameters = _contiguous(affine)
        with _on_device_of(x):
            kernels.reduce_kernel[cut.grid_of_chunks](
                dy, x, stats, gate, parts, cut.half, cut.rows, *cut.chunked, **_OPTIONS
            )
            tensors = parts, stats, of_groups, coef, grads, *parameters[:3]
            numbers = (
                float(cut.values // n * c // groups),
                float(cut.values),
                float(rule.eps),
            )
            along_batch = rule.training and not rule.estimate
            kernels.gradients_kernel[(groups,)](
                *tensors, *sizes[:-1], *numbers, along_batch, **tile, **_ALGEBRA
            )
            if needs_dx:
                kernels.gradient_kernel[cut.grid_of_tiles](
                    dy, x, dx, stats, gate, coef, cut.rows, *cut.tiled, **_OPTIONS
                )
        d_factor, d_shift, d_weight, d_bias = grads.split([c, c, groups, groups])
        return dx, Affine(
            None if batch_weight is None else d_factor,
            None if batch_bias is None else d_shift,
            None if weight is None else d_weight,
            None if weight is None else d_bias,
        )

    # -- the four functions --------------------------------------------------

    def _moments(self, rows: Tensor, dtype: torch.dtype) -> Moments:
        cut, kernels = _plan_of(rows), _kernels()
        parts = rows.new_empty(2 * cut.half + cut.rows, dtype=dtype)
        stats = rows.new_empty(2, *rows.shape[:2], dtype=dtype)
        tile = group_plan(cut, 1).tile
        with _on_device_of(rows):
            kernels.moments_kernel[cut.grid_of_chunks](
                rows, parts, None, cut.half, *cut.chunked, **_OPTIONS
            )
            numbers = cut.half, cut.rows, *cut.chunked[1:4]
            kernels.merge_kernel[(_ceil(cut.rows, tile['BN']),)](
                parts, stats, *numbers, tile['BN'], tile['BS'], **_ALGEBRA
            )
        mean, var = stats.unbind()
        return Moments(mean, var)

    def normalize(
        self,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        cut, mean = _plan_of(x), moments.mean.contiguous()
        coef = torch.stack(stages.forward(moments, batch, affine, spec))
        y = torch.empty_like(x)
        with _on_device_of(x):
            _kernels().apply_kernel[cut.grid_of_tiles](
                x, y, mean, coef, cut.rows, *cut.tiled, spec.relu, **_OPTIONS
            )
        return y

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Sums:
        cut, mean = _plan_of(x), moments.mean.contiguous()
        parts = mean.new_empty(2, *mean.shape, cut.chunks)
        gate = _gate(moments, batch, affine, spec)
        with _on_device_of(x):
            _kernels().reduce_kernel[cut.grid_of_chunks](
                dy, x, mean, gate, parts, cut.half, cut.rows, *cut.chunked, **_OPTIONS
            )
        dy_sum, moment = parts.sum(3) if cut.chunks > 1 else parts.squeeze(3)
        length = x.shape[2:].numel()
        return stages.backward_reduce(
            dy_sum, moment, length, moments, batch, affine, spec
        )

    def backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        sums: Sums,
        moments: Moments,
        batch: Batch,
        affine: Affine,
        spec: Spec,
    ) -> Tensor:
        cut, mean = _plan_of(x), moments.mean.contiguous()
        length = x.shape[2:].numel()
        coef = torch.stack(stages.backward_input(sums, length, moments, batch))
        gate = _gate(moments, batch, affine, spec)
        dx = torch.empty_like(x)
        with _on_device_of(x):
            _kernels().gradient_kernel[cut.grid_of_tiles](
                dy, x, dx, mean, gate, coef, cut.rows, *cut.tiled, **_OPTIONS
            )
        return dx


@functools.lru_cache(maxsize=None)
def _kernels() -> Any:
    """What needs Triton; raises whatever its import raises."""
    from . import triton_kernels, triton_stages

    found = {**vars(triton_kernels), **vars(triton_stages)}
    return SimpleNamespace(**{k: v for k, v in found.items() if k.endswith('_kernel')})


def _interprets() -> bool:
    """Whether Triton's interpreter, which takes tensors on the CPU, was asked for."""
    return (
        os.environ.get('TRITON_INTERPRET') == '1'
        and os.environ.get('BCN_MM_KERNELS') == 'triton'
    )


def _written(*buffers: Optional[Tensor]) -> None:
    """Tell autograd, which does not see that kernels write."""
    for t in buffers:
        if t is not None and not t.is_inference():
            increment_version(t)


def _contiguous(affine: Affine) -> Tuple[Optional[Tensor], ...]:
    return tuple(None if p is None else p.contiguous() for p in affine)


def _gate(
    moments: Moments, batch: Batch, affine: Affine, spec: Spec
) -> Optional[Tensor]:
    """What says where the ReLU is open, if there is one."""
    if not spec.relu:
        return None
    return torch.stack(stages.forward(moments, batch, affine, spec))


def _passes(
    x: Tensor, running: estimates.Running, rule: estimates.Rule
) -> Tuple[Optional[Tensor], str]:
    """The counter of training passes, for the kernels to move, and the start."""
    passes, start = running.num_batches_tracked, rule.start
    if passes is None:
        # which says what is missing, if it is needed
        estimates._rate(rule.momentum, start, None, torch.float32)
    elif passes.device != x.device:
        copy = passes.to(x.device, non_blocking=True)
        passes.add_(1)
        passes = copy
    # without a momentum, estimates are averages for ever
    return passes, 'average' if rule.momentum is None else start
