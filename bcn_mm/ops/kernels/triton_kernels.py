# mypy: allow-untyped-defs
"""The Triton kernels over tensors of full size: tiles of BR channels by BL positions.

Three kernels make a forward pass and three a backward pass: sums of rows, the
algebra between (triton_stages.py), and an affine of every element. What passes
between them, of R = N C rows:

- ``parts``: two values for each of the S chunks of a row, (2, R, S), and those of
  the forward pass about a value of each row, (R), that comes after them;
- ``stats``: mean and variance of rows and the batch stage's mean and 1 / std,
  2 R + 2 C values;
- ``coef``: what rows are mapped with, 2 R values forward (scale, at_mean) and 4 R
  back (those of :class:`bcn_mm.ops.stages.InputGradient`).

Nothing is added up by atomics, so that equal passes give equal bits. Offsets are
64 bits wide.
"""

import triton
import triton.language as tl


@triton.jit
def _place(C, S, BR: tl.constexpr):
    """The sample, channels and chunk of a program, and which channels there are."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BR)
    rest = pid // S
    c = (rest % blocks) * BR + tl.arange(0, BR)
    return rest // blocks, c, c < C, pid % S


@triton.jit
def _offsets(n, c, first, C, L, LAST: tl.constexpr, BL: tl.constexpr):
    """Where the positions from ``first`` on of channels c lie: (BR, BL)."""
    at = first + tl.arange(0, BL)
    if LAST:
        return (n * L + at)[None, :] * C + c[:, None]
    return ((n * C + c) * L)[:, None] + at[None, :]


@triton.jit(do_not_specialize=['half', 'S'])
def moments_kernel(
    x,
    parts,
    passes,  # counts training passes, or None
    half,  # R S
    C,
    L,
    S,
    chunk,
    LAST: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    """Mean and sum of squares about it, of chunks.

    Sums about the mean of the chunk's first tile, which the chunk's mean is at most
    sqrt(tiles in it) standard deviations from, so that no digits go to it. The mean
    is written about the row's first value, so that none go to that either.
    """
    n, c, c_ok, s = _place(C, S, BR)
    if passes is not None:  # noqa: SIM102  None cannot be loaded from
        if tl.program_id(0) == 0:
            tl.store(passes, tl.load(passes) + 1)
    start = s * chunk
    length = tl.minimum(start + chunk, L) - start
    step = BL
    if LAST:
        step = BL * C
    lane = tl.arange(0, BL)
    shift = x + tl.sum(_offsets(n, c, 0, C, L, LAST, 1), 1)
    shift = tl.load(shift, mask=c_ok, other=0.0).to(tl.float32)
    tile = x + _offsets(n, c, start, C, L, LAST, BL)
    ok = c_ok[:, None] & (lane < length)[None, :]
    value = tl.load(tile, mask=ok, other=0.0).to(tl.float32)
    offset = tl.where(ok, value - shift[:, None], 0.0)
    about = shift + tl.sum(offset, 1) / tl.minimum(length, BL)
    total = tl.where(ok, value - about[:, None], 0.0)
    square = total * total
    for i in range(1, tl.cdiv(length, BL).to(tl.int32)):
        tile += step
        ok = c_ok[:, None] & (i * BL + lane < length)[None, :]
        value = tl.load(tile, mask=ok, other=0.0).to(tl.float32)
        offset = tl.where(ok, value - about[:, None], 0.0)
        total += offset
        square += offset * offset
    sums = tl.sum(total, 1)
    mean = sums / length
    spread = tl.sum(square, 1) - sums * mean
    row = n * C + c
    out = parts + row * S + s
    tl.store(out, (about - shift) + mean, mask=c_ok)
    tl.store(out + half, tl.where(spread < 0, 0.0, spread), mask=c_ok)
    if s == 0:
        tl.store(parts + 2 * half + row, shift, mask=c_ok)


@triton.jit
def _gated(dy, x, scale, at_mean):
    """``dy`` where the ReLU was open; ``x`` is centred.

    The result that it was of had been rounded to its dtype.
    """
    y = (x * scale + at_mean).to(dy.dtype)
    return tl.where(y.to(tl.float32) <= 0, 0.0, dy.to(tl.float32))


@triton.jit(do_not_specialize=['half', 'R', 'S'])
def reduce_kernel(
    dy,
    x,
    stats,
    gate,  # the forward pass's coef with a ReLU, else None
    parts,
    half,
    R,
    C,
    L,
    S,
    chunk,
    LAST: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    """Sums of dy and of dy (x - mean), of chunks."""
    n, c, c_ok, s = _place(C, S, BR)
    start = s * chunk
    length = tl.minimum(start + chunk, L) - start
    step = BL
    if LAST:
        step = BL * C
    row = n * C + c
    mean = tl.load(stats + row, mask=c_ok, other=0.0)[:, None]
    if gate is not None:
        scale = tl.load(gate + row, mask=c_ok, other=0.0)[:, None]
        at_mean = tl.load(gate + R + row, mask=c_ok, other=0.0)[:, None]
    lane = tl.arange(0, BL)
    tile = _offsets(n, c, start, C, L, LAST, BL)
    total = tl.zeros((BR, BL), tl.float32)
    moment = tl.zeros((BR, BL), tl.float32)
    for i in range(0, tl.cdiv(length, BL).to(tl.int32)):
        ok = c_ok[:, None] & (i * BL + lane < length)[None, :]
        value = tl.load(x + tile, mask=ok, other=0.0).to(tl.float32) - mean
        grad = tl.load(dy + tile, mask=ok, other=0.0)
        if gate is not None:
            grad = _gated(grad, value, scale, at_mean)
        else:
            grad = grad.to(tl.float32)
        total += grad
        moment += grad * value
        tile += step
    out = parts + row * S + s
    tl.store(out, tl.sum(total, 1), mask=c_ok)
    tl.store(out + half, tl.sum(moment, 1), mask=c_ok)


@triton.jit(do_not_specialize=['R', 'T'])
def apply_kernel(
    x,
    other,
    y,
    stats,
    coef,
    R,
    C,
    L,
    T,
    LAST: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
    RELU: tl.constexpr,
):
    """``scale (x - mean) + at_mean``, plus another tensor, of a tile."""
    n, c, c_ok, t = _place(C, T, BR)
    at = t * BL + tl.arange(0, BL)
    ok = c_ok[:, None] & (at < L)[None, :]
    tile = _offsets(n, c, t * BL, C, L, LAST, BL)
    row = n * C + c
    mean = tl.load(stats + row, mask=c_ok, other=0.0)[:, None]
    scale = tl.load(coef + row, mask=c_ok, other=0.0)[:, None]
    at_mean = tl.load(coef + R + row, mask=c_ok, other=0.0)[:, None]
    value = tl.load(x + tile, mask=ok, other=0.0).to(tl.float32) - mean
    value = value * scale + at_mean
    if other is not None:
        value = value.to(y.dtype.element_ty).to(tl.float32)
        value += tl.load(other + tile, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value <= 0, 0.0, value)
    tl.store(y + tile, value.to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=['R', 'T'])
def gradient_kernel(
    dy,
    x,
    dx,
    stats,
    gate,
    coef,
    R,
    C,
    L,
    T,
    LAST: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
):
    """The gradient of x, of a tile."""
    n, c, c_ok, t = _place(C, T, BR)
    at = t * BL + tl.arange(0, BL)
    ok = c_ok[:, None] & (at < L)[None, :]
    tile = _offsets(n, c, t * BL, C, L, LAST, BL)
    row = n * C + c
    mean = tl.load(stats + row, mask=c_ok, other=0.0)[:, None]
    value = tl.load(x + tile, mask=ok, other=0.0).to(tl.float32) - mean
    grad = tl.load(dy + tile, mask=ok, other=0.0)
    if gate is not None:
        scale = tl.load(gate + row, mask=c_ok, other=0.0)[:, None]
        shift = tl.load(gate + R + row, mask=c_ok, other=0.0)[:, None]
        grad = _gated(grad, value, scale, shift)
    else:
        grad = grad.to(tl.float32)
    dy_mean = tl.load(coef + row, mask=c_ok, other=0.0)[:, None]
    dy_scale = tl.load(coef + R + row, mask=c_ok, other=0.0)[:, None]
    x_scale = tl.load(coef + 2 * R + row, mask=c_ok, other=0.0)[:, None]
    at_mean = tl.load(coef + 3 * R + row, mask=c_ok, other=0.0)[:, None]
    value = (grad - dy_mean) * dy_scale + (value * x_scale + at_mean)
    tl.store(dx + tile, value.to(dx.dtype.element_ty), mask=ok)


# -- what chunks add up to, in tiles of BN samples by BD channels by BS chunks ------


@triton.jit
def merged_moments(parts, half, row, ok, L, S, chunk, BS: tl.constexpr):
    """Mean and biased variance of rows, from those of their chunks."""
    s = tl.arange(0, BS)[None, None, :]
    all_ok = ok[:, :, None] & (s < S)
    at = parts + (row * S)[:, :, None] + s
    count = tl.where(s < S, tl.minimum(L - s * chunk, chunk), 0).to(tl.float32)
    mean = tl.load(at, mask=all_ok, other=0.0)
    square = tl.load(at + half, mask=all_ok, other=0.0)
    first = tl.load(parts + row * S, mask=ok, other=0.0)
    delta = tl.where(all_ok, mean - first[:, :, None], 0.0)
    centre = first + tl.sum(delta * count, 2) / L
    delta = tl.where(all_ok, mean - centre[:, :, None], 0.0)
    rest = tl.sum(delta * count, 2) / L
    var = tl.sum(square + delta * delta * count, 2) / L - rest * rest
    shift = tl.load(parts + 2 * half + row, mask=ok, other=0.0)
    return shift + (centre + rest), tl.where(var < 0, 0.0, var)


@triton.jit
def merged_sums(parts, half, row, ok, S, BS: tl.constexpr):
    """The two sums of rows, over the S chunks of each."""
    s = tl.arange(0, BS)[None, None, :]
    all_ok = ok[:, :, None] & (s < S)
    at = parts + (row * S)[:, :, None] + s
    total = tl.sum(tl.load(at, mask=all_ok, other=0.0), 2)
    return total, tl.sum(tl.load(at + half, mask=all_ok, other=0.0), 2)


@triton.jit(do_not_specialize=['half', 'R', 'L', 'S', 'chunk'])
def merge_kernel(
    parts, stats, half, R, L, S, chunk, BN: tl.constexpr, BS: tl.constexpr
):
    """The moments of rows, where nothing follows that could merge them itself."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[:, None]
    ok = row < R
    mean, var = merged_moments(parts, half, row, ok, L, S, chunk, BS)
    tl.store(stats + row, mean, mask=ok)
    tl.store(stats + R + row, var, mask=ok)


# -- Weight Standardization, a filter of K weights a program ------------------------


@triton.jit
def standardize_kernel(
    weight,
    result,
    saved,  # mean, gain and slope of filters, (3, out)
    out,
    K,
    freedom,  # K, less 1 for an unbiased variance
    eps,
    UNDER_ROOT: tl.constexpr,  # else eps is added to the root
    BK: tl.constexpr,
):
    """``gain (w - mean)``; slope is that of gain by the sum of squares, times -2."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BK)
    filters = weight + row * K
    total = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        total += tl.load(filters + start + lane, mask=start + lane < K, other=0.0)
    mean = tl.sum(total, 0) / K
    total = tl.zeros((BK,), tl.float32)
    square = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        ok = start + lane < K
        value = tl.load(filters + start + lane, mask=ok, other=0.0)
        value = tl.where(ok, value - mean, 0.0)
        total += value
        square += value * value
    # what rounding has left in the mean, which a small variance would feel
    rest = tl.sum(total, 0) / K
    var = tl.sum(square, 0) - rest * rest * K
    var = tl.where(var < 0, 0.0, var) / freedom
    if UNDER_ROOT:
        gain = 1 / tl.sqrt_rn(var + eps)
        slope = gain * gain * gain
    else:
        root = tl.sqrt_rn(var)
        gain = 1 / (root + eps)
        # a filter without variance has no direction to grow in
        slope = tl.where(root == 0, 0.0, gain * gain / tl.where(root == 0, 1.0, root))
    tl.store(saved + row, mean + rest)
    tl.store(saved + out + row, gain)
    tl.store(saved + 2 * out + row, slope / freedom)
    for start in range(0, K, BK):
        ok = start + lane < K
        value = tl.load(filters + start + lane, mask=ok, other=0.0)
        value = (value - mean - rest) * gain
        tl.store(result + row * K + start + lane, value, mask=ok)


@triton.jit
def standardize_backward_kernel(grad, weight, result, saved, out, K, BK: tl.constexpr):
    """``gain (dy - mean of dy) - slope (w - mean) sum of dy (w - mean)``."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BK)
    mean = tl.load(saved + row)
    gain = tl.load(saved + out + row)
    slope = tl.load(saved + 2 * out + row)
    total = tl.zeros((BK,), tl.float32)
    moment = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        ok = start + lane < K
        at = row * K + start + lane
        dy = tl.load(grad + at, mask=ok, other=0.0)
        total += dy
        moment += dy * (tl.load(weight + at, mask=ok, other=0.0) - mean)
    dy_mean = tl.sum(total, 0) / K
    slope *= tl.sum(moment, 0)
    for start in range(0, K, BK):
        ok = start + lane < K
        at = row * K + start + lane
        dy = tl.load(grad + at, mask=ok, other=0.0)
        value = tl.load(weight + at, mask=ok, other=0.0) - mean
        tl.store(result + at, gain * (dy - dy_mean) - slope * value, mask=ok)
