"""The passes on CUDA as kernels in Triton: three launches forward, three back.

What there is to launch is in triton_kernels.py and triton_stages.py, and into how
many programs it is cut in triton_plan.py; here it is launched. The first time that a
device and dtype come by, the results are held against those of ordinary operators.
"""

import functools
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Hashable,
    List,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from .. import estimates, stages
from .._compat import increment_version
from ..layout import dense, in_layout_of
from ..stages import Affine, Batch, Moments, Spec, Sums
from .eager import Coefficients, Eager
from .trial import disagreement, said
from .triton_plan import Plan, ceil_div, filter_plan, group_plan, plan

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# asked for, since what Triton does unasked is about to change
_OPTIONS = dict(num_warps=4, enable_fp_fusion=True)
_FEW = ('stages', 'gradients', 'merge')  # kernels whose programs are few
_ALGEBRA = dict(num_warps=8, enable_fp_fusion=True)  # for these
_ALIGNED = 16  # bytes, which Triton asks of all that it reads in large pieces
_KNOWN = 4096  # ways to make a pass that are remembered


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
        self._direct = True  # whether to launch what is known to be compiled
        self._compiled: Dict[Hashable, Dict[str, Any]] = {}

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
                    found = disagreement(self, *key)
                    if found and self._direct:
                        self._direct = False  # another Triton may lack that way
                        found = disagreement(self, *key)
                    self._objections[key] = found
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

    # -- launches ------------------------------------------------------------

    def _launcher(self, key: Optional[Hashable]) -> Callable[..., None]:
        """A function that launches the kernels of a pass.

        Triton looks at every argument to find what it has compiled for the like,
        which takes longer than the launch. So what has been launched under an equal
        key, each kernel once, is launched again as it was compiled then.

        Args:
            key (hashable, optional): All that decides what is compiled; None if
                that is for Triton to find.
        """
        if len(self._compiled) > _KNOWN:
            self._compiled.clear()
        known: Dict[str, Any] = {}
        stream = 0
        if key is not None and self._direct:
            known = self._compiled.setdefault(key, known)
            stream = torch.cuda.current_stream().cuda_stream if known else 0

        def launch(name: str, programs: int, *args: Any) -> None:
            made = known.get(name)
            if made is None:
                options = _ALGEBRA if name in _FEW else _OPTIONS
                kernel = getattr(_kernels(), name + '_kernel')
                made = kernel[(programs,)](*args, **options)
                if made is not None:  # as it is for the interpreter
                    known[name] = made
            else:
                # what the kernel itself does in the end; the three that are None
                # are there for a profiler of Triton's
                how = stream, made.function, made.packed_metadata, None, None, None
                made.run(programs, 1, 1, *how, *args)

        return launch

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
        coef: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        cut, groups = _plan_of(x), spec.num_groups
        n, c = x.shape[:2]
        sizes, tile = group_plan(cut, c // groups)
        parts = x.new_empty(2 * cut.half + cut.rows, dtype=torch.float32)
        stats = x.new_empty(2 * cut.rows + 2 * c, dtype=torch.float32)
        if coef is None:
            coef = x.new_empty(2 * cut.rows, dtype=torch.float32)
        y = torch.empty_like(x)
        moves = rule.training and not repeats
        passes, start = _passes(x, running, rule) if moves else (None, 'identity')
        mean, var = running.mean.contiguous(), running.var.contiguous()
        unbiased = 1.0 if rule.estimate else cut.values / max(cut.values - 1, 1)
        # where estimates move, all samples of a group are one program's
        portion = n if moves else tile[0]
        tensors = mean, var, passes, *_contiguous(affine), batch
        numbers = portion, float(rule.momentum or 0), unbiased, float(rule.eps)
        how = moves, rule.estimate, start, repeats
        key = _key('forward', (x, *tensors), cut, *how, *spec)
        with _on_device_of(x):
            launch = self._launcher(key)
            args: Tuple[Any, ...] = x, parts, passes, cut.half, *cut.chunked
            launch('moments', cut.chunk_programs, *args)
            args = parts, stats, coef, *tensors, *sizes, *numbers, *how, *tile
            launch('stages', groups * ceil_div(n, portion), *args)
            args = x, None, y, stats, coef, cut.rows, *cut.tiled, spec.relu
            launch('apply', cut.tile_programs, *args)
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
        cut, groups = _plan_of(x), spec.num_groups
        (n, c), (sizes, tile) = x.shape[:2], group_plan(cut, x.shape[1] // groups)
        stats, gate = saved if spec.relu else (*saved, None)
        parts = x.new_empty(2 * cut.half, dtype=torch.float32)
        of_groups = x.new_empty(4 * n * groups, dtype=torch.float32)
        grads = x.new_empty(2 * c + 2 * groups, dtype=torch.float32)
        coef = x.new_empty(4 * cut.rows, dtype=torch.float32) if needs_dx else None
        dx = torch.empty_like(x) if needs_dx else None
        batch_weight, batch_bias, weight, _ = parameters = _contiguous(affine)
        tensors = parts, stats, of_groups, coef, grads, *parameters[:3]
        numbers = float(cut.values // n * c // groups), float(cut.values)
        along_batch = rule.training and not rule.estimate
        key = _key('backward', (dy, x, gate, *tensors), cut, along_batch, *spec)
        with _on_device_of(x):
            launch = self._launcher(key)
            args: Tuple[Any, ...] = dy, x, stats, gate, parts, cut.half, cut.rows
            args = *args, *cut.chunked
            launch('reduce', cut.chunk_programs, *args)
            args = *tensors, *sizes[:-1], *numbers, float(rule.eps), along_batch, *tile
            launch('gradients', groups, *args)
            if needs_dx:
                args = dy, x, dx, stats, gate, coef, cut.rows, *cut.tiled
                launch('gradient', cut.tile_programs, *args)
        of_each = [c, c, groups, groups]
        d_factor, d_shift, d_weight, d_bias = grads.split_with_sizes(of_each)
        return dx, Affine(
            None if batch_weight is None else d_factor,
            None if batch_bias is None else d_shift,
            None if weight is None else d_weight,
            None if weight is None else d_bias,
        )

    # -- the four functions --------------------------------------------------

    def _moments(self, rows: Tensor, dtype: torch.dtype) -> Moments:
        cut, launch = _plan_of(rows), self._launcher(None)
        parts = rows.new_empty(2 * cut.half + cut.rows, dtype=dtype)
        stats = rows.new_empty(2, *rows.shape[:2], dtype=dtype)
        bn, _, bs = group_plan(cut, 1).tile
        numbers = cut.half, cut.rows, *cut.chunked[1:4]
        with _on_device_of(rows):
            args = rows, parts, None, cut.half, *cut.chunked
            launch('moments', cut.chunk_programs, *args)
            launch('merge', ceil_div(cut.rows, bn), parts, stats, *numbers, bn, bs)
        mean, var = stats.unbind()
        return Moments(mean, var)

    def apply(
        self,
        x: Tensor,
        moments: Moments,
        coef: Coefficients,
        relu: bool = False,
        other: Optional[Tensor] = None,
    ) -> Tensor:
        cut, mean = _plan_of(x), moments.mean.contiguous()
        if not isinstance(coef, Tensor):
            coef = torch.stack(coef)
        if other is not None:
            other = in_layout_of(other, x)
        y = torch.empty_like(x)
        key = _key('apply', (x, mean, coef, other), cut, relu)
        with _on_device_of(x):
            args = x, other, y, mean, coef, cut.rows, *cut.tiled, relu
            self._launcher(key)('apply', cut.tile_programs, *args)
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
            args = dy, x, mean, gate, parts, cut.half, cut.rows, *cut.chunked
            self._launcher(None)('reduce', cut.chunk_programs, *args)
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
            args = dy, x, dx, mean, gate, coef, cut.rows, *cut.tiled
            self._launcher(None)('gradient', cut.tile_programs, *args)
        return dx

    # -- weight standardization ----------------------------------------------

    def standardize(
        self, weight: Tensor, eps: float, unbiased: bool, under_root: bool
    ) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        work = dense(weight)  # filter after filter
        out, fan, tile = filter_plan(*work.shape)
        result = torch.empty_like(work)
        saved = work.new_empty(3, out)
        key = _key('standardize', (work, saved), work.shape, under_root)
        with _on_device_of(work):
            numbers = float(fan - unbiased), float(eps), under_root, tile
            args = work, result, saved, out, fan, *numbers
            self._launcher(key)('standardize', out, *args)
        if work is not weight:
            result = torch.empty_like(weight).copy_(result)
        return result, (saved,)

    def standardize_backward(
        self,
        grad: Tensor,
        weight: Tensor,
        saved: Sequence[Tensor],
        unbiased: bool,
        under_root: bool,
    ) -> Tensor:
        work = dense(weight)
        grad = in_layout_of(grad, work)
        out, fan, tile = filter_plan(*work.shape)
        result = torch.empty_like(work)
        key = _key('standardize_backward', (work, grad, *saved), work.shape)
        with _on_device_of(work):
            args = grad, work, result, *saved, out, fan, tile
            self._launcher(key)('standardize_backward', out, *args)
        return result


@functools.lru_cache(maxsize=None)
def _kernels() -> Any:
    """What needs Triton; raises whatever its import raises."""
    from . import triton_kernels, triton_stages

    found = {**vars(triton_kernels), **vars(triton_stages)}
    return SimpleNamespace(**{k: v for k, v in found.items() if k.endswith('_kernel')})


def _key(
    name: str, tensors: Tuple[Optional[Tensor], ...], *facts: Hashable
) -> Optional[Hashable]:
    """All that decides what Triton compiles for the kernels of a pass.

    None where a tensor is not aligned as all that torch allocates is.
    """
    addresses = 0
    kinds: List[Optional[tuple]] = []
    for t in tensors:
        if t is not None:
            addresses |= t.data_ptr()
            kinds.append((t.dtype, t.get_device()))
        else:
            kinds.append(None)
    return None if addresses % _ALIGNED else (name, tuple(kinds), facts)


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
