"""Whether a fused backend agrees with the plain path, on small random tensors."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
from torch import Tensor

from .. import estimates
from ..stages import Affine, Spec
from .eager import Eager

_SHAPE, _GROUPS = (2, 6, 40, 41), 3
_TRIALS = (  # training, estimate, ReLU, start, memory format
    (True, True, True, 'average', torch.contiguous_format),
    (True, False, False, 'identity', torch.channels_last),
    (False, True, False, 'identity', torch.contiguous_format),
)

# unbiased variance, eps under the root; those of a weight are float32
_DIALECTS = ((True, False), (False, True))
_FILTERS = (5, 3, 3, 3)
# since a backend may make what it has made before in another way
_TIMES = 2


def disagreement(kernels: Eager, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with a fused backend, by the plain path; empty if nothing is.

    Args:
        kernels (Eager): The backend.
        device (torch.device): Where to try it, on small random tensors.
        dtype (torch.dtype): Of these.
    """
    where = f'for {dtype} on {device}'
    try:
        with torch.no_grad(), _plainly(device):
            for trial in _TRIALS:
                for _ in range(_TIMES):
                    what = _difference(kernels, device, dtype, *trial)
                    if what:
                        return f'{kernels!r} is wrong {where}: {what}'
            if dtype == torch.float32:
                for dialect in _DIALECTS * _TIMES:
                    what = _weight_difference(kernels, device, *dialect)
                    if what:
                        return f'{kernels!r} is wrong {where}: {what}'
    except Exception as error:  # compilers and drivers raise what they like
        return f'{kernels!r} fails {where}: {said(error)}'
    return ''


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Without autocast, and where results may be waited for."""
    mode = 0
    if device.type == 'cuda':
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


def _difference(
    kernels: Eager,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    estimate: bool,
    relu: bool,
    start: str,
    memory_format: torch.memory_format,
) -> str:
    draw = _generator(device)

    def large() -> Tensor:
        return draw(*_SHAPE).to(dtype).contiguous(memory_format=memory_format)

    channels = _SHAPE[1]
    x, dy = large().add_(3), large()
    affine = Affine(*(draw(k) for k in (channels, channels, _GROUPS, _GROUPS)))
    mean, var = draw(channels) + 3, draw(channels).abs_() + 0.5
    rule = estimates.Rule(training, estimate, 0.1, start, 1e-5)
    spec = Spec(_GROUPS, 1e-5, relu)

    def buffers() -> estimates.Running:
        count = torch.tensor(2, device=device)
        return estimates.Running(mean.clone(), var.clone(), count)

    plain, running = Eager(), buffers()
    moments = plain.moments(x)
    # not batch_of, which a checkpoint around this would take notice of
    batch = estimates._step(moments, x.shape[2:].numel(), running, rule, None)
    known = moments, batch, affine, spec
    y = plain.normalize(x, *known)
    # where rounding decides about the ReLU, nothing comes back
    linear = plain.normalize(x, *known[:-1], spec._replace(relu=False))
    dy.mul_(linear.abs() > 1e-2)
    sums = plain.backward_reduce(dy, x, *known)
    dx = plain.backward_input(dy, x, sums, *known)
    want = (y, dx, *sums.affine, *running)

    running = buffers()
    y, saved = kernels.forward(x, running, rule, affine, spec)
    dx_and_grads = kernels.backward(dy, x, saved, affine, rule, spec, True)
    got = (y, dx_and_grads[0], *dx_and_grads[1], *running)

    names = ('y', 'dx', *(f'the gradient of {name}' for name in Affine._fields))
    names += tuple(f'running {name}' for name in estimates.Running._fields)
    return _first_wrong(dtype, names, got, want)


def _weight_difference(
    kernels: Eager, device: torch.device, unbiased: bool, under_root: bool
) -> str:
    draw, plain = _generator(device), Eager()
    weight, grad = draw(*_FILTERS), draw(*_FILTERS)
    results = []
    for backend in (kernels, plain):
        result, saved = backend.standardize(weight, 1e-5, unbiased, under_root)
        more = backend.standardize_backward(grad, weight, saved, unbiased, under_root)
        results.append((result, more))
    names = 'a standardized weight', 'the gradient of a weight'
    return _first_wrong(torch.float32, names, *results)


def _generator(device: torch.device) -> Callable[..., Tensor]:
    """Equal random numbers each time, which moves no other generator."""
    generator = torch.Generator('cpu').manual_seed(0)
    like: Any = dict(generator=generator, device='cpu', dtype=torch.float32)
    return lambda *shape: torch.randn(shape, **like).to(device)


def _first_wrong(
    dtype: torch.dtype,
    names: Sequence[str],
    got: Sequence[Optional[Tensor]],
    want: Sequence[Optional[Tensor]],
) -> str:
    for name, a, b in zip(names, got, want):
        if a is None or b is None:
            return f'there is no {name}'
        a, b = a.double(), b.double()
        slack = max(1e-3, 8 * torch.finfo(dtype).eps) * b.abs().max().item()
        error = (a - b).abs().max().item()
        if not error <= slack:
            return f'{name} is off by {error:.3g}, where {slack:.3g} may be'
    return ''


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0]
