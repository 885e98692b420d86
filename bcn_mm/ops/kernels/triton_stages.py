# mypy: allow-untyped-defs
"""The algebra of :mod:`bcn_mm.ops.stages` in Triton, and the move of the estimates.

A program has a group, and goes over it in tiles of BN samples by BD channels;
triton_kernels.py says what it is given. What one part of a program writes and
another reads has a barrier between.
"""

import triton
import triton.language as tl

from .triton_kernels import merged_moments, merged_sums


@triton.jit
def _rows(n0, n1, c0, d0, C, D, BN: tl.constexpr, BD: tl.constexpr):
    """A tile's samples and channels, its rows, and which of them there are."""
    n = (n0 + tl.arange(0, BN)).to(tl.int64)
    d = d0 + tl.arange(0, BD)
    n_ok, c_ok = n < n1, d < D
    c = c0 + d
    row = n[:, None] * C + c[None, :]
    return n, n_ok, c, c_ok, row, n_ok[:, None] & c_ok[None, :]


@triton.jit
def _z(stats, R, row, ok, c, c_ok, C, batch_weight, batch_bias):
    """What the batch stage makes of row means, and how.

    Returns:
        tuple: z, the mean of x about that of the batch stage, its factor, its
        1 / std (the latter two of channels), and the variance of x.
    """
    mean = tl.load(stats + row, mask=ok, other=0.0)
    var = tl.load(stats + R + row, mask=ok, other=0.0)
    shift = tl.load(stats + 2 * R + c, mask=c_ok, other=0.0)
    inv_std = tl.load(stats + 2 * R + C + c, mask=c_ok, other=0.0)
    factor = inv_std
    if batch_weight is not None:
        factor = inv_std * tl.load(batch_weight + c, mask=c_ok, other=0.0)
    offset = mean - shift[None, :]
    z = offset * factor[None, :]
    if batch_bias is not None:
        z += tl.load(batch_bias + c, mask=c_ok, other=0.0)[None, :]
    return z, offset, factor, inv_std, var


@triton.jit
def _group(
    stats,
    R,
    n0,
    n1,
    c0,
    C,
    D,
    eps,
    batch_weight,
    batch_bias,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Mean of z and 1 / std of a group, of BN samples."""
    total = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BD):
        n, n_ok, c, c_ok, row, ok = _rows(n0, n1, c0, d0, C, D, BN, BD)
        z, _o, _f, _i, _v = _z(stats, R, row, ok, c, c_ok, C, batch_weight, batch_bias)
        total += tl.sum(tl.where(ok, z, 0.0), 1)
    centre = total / D
    total = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BD):
        n, n_ok, c, c_ok, row, ok = _rows(n0, n1, c0, d0, C, D, BN, BD)
        z, _o, factor, _i, var = _z(
            stats, R, row, ok, c, c_ok, C, batch_weight, batch_bias
        )
        z -= centre[:, None]
        var *= (factor * factor)[None, :]
        total += tl.sum(tl.where(ok, var + z * z, 0.0), 1)
    return centre, tl.rsqrt(total / D + eps)


# -- forward -------------------------------------------------------------------


@triton.jit
def _batch_statistics(
    parts, stats, half, c0, d0, N, n0, n1, R, C, D, L, S, chunk,
    TRAINING: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Write the moments of rows; the batch's mean and, in training, biased variance,
    (BD)."""
    d = d0 + tl.arange(0, BD)
    channel = c0 + d
    first = tl.load(parts + channel * S, mask=d < D, other=0.0)
    first += tl.load(parts + 2 * half + channel, mask=d < D, other=0.0)
    total = tl.zeros((BD,), tl.float32)
    for start in range(n0, n1, BN):
        n, n_ok, c, c_ok, row, ok = _rows(start, n1, c0, d0, C, D, BN, BD)
        mean, var = merged_moments(parts, half, row, ok, L, S, chunk, BS)
        tl.store(stats + row, mean, mask=ok)
        tl.store(stats + R + row, var, mask=ok)
        total += tl.sum(tl.where(ok, mean - first[None, :], 0.0), 0)
    centre = first + total / N
    spread = total
    if TRAINING:
        tl.debug_barrier()
        total = tl.zeros((BD,), tl.float32)
        square = tl.zeros((BD,), tl.float32)
        for start in range(n0, n1, BN):
            n, n_ok, c, c_ok, row, ok = _rows(start, n1, c0, d0, C, D, BN, BD)
            mean = tl.load(stats + row, mask=ok, other=0.0)
            var = tl.load(stats + R + row, mask=ok, other=0.0)
            offset = tl.where(ok, mean - centre[None, :], 0.0)
            total += tl.sum(offset, 0)
            square += tl.sum(var + offset * offset, 0)
        # without the rounding of the mean, which a small variance magnifies
        rest = total / N
        centre += rest
        spread = square / N - rest * rest
        spread = tl.where(spread < 0, 0.0, spread)
    return centre, spread


@triton.jit
def _rate(passes, momentum, START: tl.constexpr):
    """How far estimates move, and the same where that is above ``momentum``."""
    rate = momentum
    large = momentum * 0
    if START != 'identity':
        count = tl.load(passes).to(tl.float32)
        rate = tl.where(count == 1, 1.0, 0.0) if START == 'first' else 1.0 / count
        rate = tl.maximum(rate, momentum)
        large = tl.where(rate > momentum, rate, 0.0)
    return rate, large


@triton.jit
def _lerp(old, value, rate):
    if old.dtype != tl.float64:
        old = old.to(tl.float32)
        value = value.to(tl.float32)
    step = value - old
    return tl.where(rate < 0.5, old + rate * step, value - step * (1 - rate))


# not one variant for every property of a number: none is worth a compilation
_NUMBERS = ['half', 'N', 'R', 'C', 'D', 'L', 'S', 'chunk', 'portion']


@triton.jit(do_not_specialize=_NUMBERS)
def stages_kernel(
    parts,
    stats,
    coef,
    running_mean,
    running_var,
    passes,  # moved already
    batch_weight,
    batch_bias,
    weight,
    bias,
    batch,  # what a repetition is to normalize with, (2, C), or None
    half,
    N,
    R,
    C,
    D,
    L,
    S,
    chunk,
    portion,  # of samples, for one program
    momentum,
    unbiased,  # variance, of a biased one
    eps,
    TRAINING: tl.constexpr,
    ESTIMATE: tl.constexpr,
    START: tl.constexpr,
    REPEATS: tl.constexpr,  # whether this is that repetition
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    """From the moments of chunks to what rows are mapped with."""
    groups = C // D
    group = tl.program_id(0) % groups
    c0 = group.to(tl.int64) * D
    n0 = (tl.program_id(0) // groups) * portion
    n1 = tl.minimum(n0 + portion, N)
    for d0 in range(0, D, BD):
        mean, var = _batch_statistics(
            parts, stats, half, c0, d0, N, n0, n1, R, C, D, L, S, chunk,
            TRAINING, BN, BD, BS,
        )  # fmt: skip
        d = d0 + tl.arange(0, BD)
        c = c0 + d
        c_ok = d < D
        old_mean = tl.load(running_mean + c, mask=c_ok, other=0.0)
        old_var = tl.load(running_var + c, mask=c_ok, other=0.0)
        new_mean = old_mean
        new_var = old_var
        if TRAINING:
            rate, large = _rate(passes, momentum, START)
            to = mean
            spread = var * unbiased
            if ESTIMATE:
                # about the estimate; at a rate that is not small, the variance of
                # what the estimates are a mean of
                step = mean - old_mean.to(tl.float32)
                spread = var + (1 - large) * step * step
            # unless the dtype of the estimates overflows
            to = to.to(old_mean.dtype)
            spread = spread.to(old_var.dtype)
            finite = tl.abs(to.to(tl.float32)) + spread.to(tl.float32) < float('inf')
            moved = _lerp(old_mean, tl.where(finite, to, old_mean), rate)
            new_mean = moved.to(old_mean.dtype)
            moved = _lerp(old_var, tl.where(finite, spread, old_var), rate)
            new_var = moved.to(old_var.dtype)
            # threads may hold copies, and all must have read before one writes
            tl.debug_barrier()
            tl.store(running_mean + c, new_mean, mask=c_ok)
            tl.store(running_var + c, new_var, mask=c_ok)
        if ESTIMATE or not TRAINING:
            mean = new_mean.to(tl.float32)
            var = new_var.to(tl.float32)
        inv_std = tl.rsqrt(var + eps)
        if batch is not None:
            if REPEATS:
                mean = tl.load(batch + c, mask=c_ok, other=0.0).to(tl.float32)
                inv_std = tl.load(batch + C + c, mask=c_ok, other=0.0).to(tl.float32)
            else:
                tl.store(batch + c, mean.to(tl.float64), mask=c_ok)
                tl.store(batch + C + c, inv_std.to(tl.float64), mask=c_ok)
        tl.store(stats + 2 * R + c, mean, mask=c_ok)
        tl.store(stats + 2 * R + C + c, inv_std, mask=c_ok)
    tl.debug_barrier()
    gain_of_group = 1.0
    shift = 0.0
    if weight is not None:
        gain_of_group = tl.load(weight + group)
    if bias is not None:
        shift = tl.load(bias + group)
    for start in range(n0, n1, BN):
        centre, gain = _group(
            stats, R, start, n1, c0, C, D, eps, batch_weight, batch_bias, BN, BD
        )
        gain *= gain_of_group
        for d0 in range(0, D, BD):
            n, n_ok, c, c_ok, row, ok = _rows(start, n1, c0, d0, C, D, BN, BD)
            z, _o, factor, _i, _v = _z(
                stats, R, row, ok, c, c_ok, C, batch_weight, batch_bias
            )
            tl.store(coef + row, gain[:, None] * factor[None, :], mask=ok)
            at_mean = shift + (z - centre[:, None]) * gain[:, None]
            tl.store(coef + R + row, at_mean, mask=ok)


# -- backward ------------------------------------------------------------------


@triton.jit
def _gradients(
    parts, stats, of_groups, half, start, N, R, C, D, L, S, group, c0, d0,
    batch_weight, batch_bias, BN: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of a tile: sums of dy, of dz and of dz (x - mean of the batch stage).

    dz is ``gain (dy - p - q (x - mean))``; q, gain and what else dx needs follow.
    """
    n, n_ok, c, c_ok, row, ok = _rows(start, N, c0, d0, C, D, BN, BD)
    total, moment = merged_sums(parts, half, row, ok, S, BS)
    z, offset, factor, _i, var = _z(
        stats, R, row, ok, c, c_ok, C, batch_weight, batch_bias
    )
    at = of_groups + n * (C // D) + group
    step = R // D
    centre = tl.load(at, mask=n_ok, other=0.0)[:, None]
    gain = tl.load(at + step, mask=n_ok, other=0.0)[:, None]
    q = tl.load(at + 2 * step, mask=n_ok, other=0.0)[:, None]
    p = tl.load(at + 3 * step, mask=n_ok, other=0.0)[:, None] + (z - centre) * q
    q = q * factor[None, :]
    dz_sum = (total - L * p) * gain
    dz_moment = (moment - L * q * var) * gain + offset * dz_sum
    return row, ok, total, dz_sum, dz_moment, q, gain, factor, offset


@triton.jit(do_not_specialize=_NUMBERS[:-2])
def gradients_kernel(
    parts,  # sums of dy and of dy (x - mean)
    stats,
    of_groups,  # 4 values of every sample and group, (4, N, G)
    coef,  # or None
    grads,  # of batch_weight, batch_bias, weight and bias, one after the other
    batch_weight,
    batch_bias,
    weight,
    half,
    N,
    R,
    C,
    D,
    L,
    S,
    size,  # values in a group
    num_values,
    eps,
    BATCH: tl.constexpr,  # whether gradients flow through the batch's statistics
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    """The gradients of the parameters, and what that of x is made of."""
    group = tl.program_id(0)
    groups = C // D
    c0 = group.to(tl.int64) * D
    all_groups = R // D
    gain_of_group = 1.0
    if weight is not None:
        gain_of_group = tl.load(weight + group)
    d_weight = 0.0
    d_bias = 0.0
    for start in range(0, N, BN):
        centre, inv_std = _group(
            stats, R, start, N, c0, C, D, eps, batch_weight, batch_bias, BN, BD
        )
        along = tl.zeros((BN,), tl.float32)  # sums of dy z', z' = z - centre
        total = tl.zeros((BN,), tl.float32)  # and of dy
        for d0 in range(0, D, BD):
            n, n_ok, c, c_ok, row, ok = _rows(start, N, c0, d0, C, D, BN, BD)
            dy_sum, moment = merged_sums(parts, half, row, ok, S, BS)
            z, _o, factor, _i, _v = _z(
                stats, R, row, ok, c, c_ok, C, batch_weight, batch_bias
            )
            part = (z - centre[:, None]) * dy_sum + moment * factor[None, :]
            along += tl.sum(tl.where(ok, part, 0.0), 1)
            total += tl.sum(dy_sum, 1)
        sample = (start + tl.arange(0, BN)).to(tl.int64)
        out = of_groups + sample * groups + group
        tl.store(out, centre, mask=sample < N)
        tl.store(out + all_groups, inv_std * gain_of_group, mask=sample < N)
        q = inv_std * inv_std * along / size
        tl.store(out + 2 * all_groups, q, mask=sample < N)
        tl.store(out + 3 * all_groups, total / size, mask=sample < N)
        d_weight += tl.sum(tl.where(sample < N, along * inv_std, 0.0), 0)
        d_bias += tl.sum(tl.where(sample < N, total, 0.0), 0)
    tl.store(grads + 2 * C + group, d_weight)
    tl.store(grads + 2 * C + groups + group, d_bias)
    tl.debug_barrier()
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inv_std = tl.load(stats + 2 * R + C + c0 + d, mask=d < D, other=0.0)
        d_shift = tl.zeros((BD,), tl.float32)
        d_factor = tl.zeros((BD,), tl.float32)
        for start in range(0, N, BN):
            _r, ok, _t, dz_sum, dz_moment, _q, _g, _f, _o = _gradients(
                parts, stats, of_groups, half, start, N, R, C, D, L, S, group,
                c0, d0, batch_weight, batch_bias, BN, BD, BS,
            )  # fmt: skip
            d_shift += tl.sum(tl.where(ok, dz_sum, 0.0), 0)
            d_factor += tl.sum(tl.where(ok, dz_moment, 0.0), 0)
        d_factor *= inv_std
        tl.store(grads + c0 + d, d_factor, mask=d < D)
        tl.store(grads + C + c0 + d, d_shift, mask=d < D)
        if coef is not None:
            for start in range(0, N, BN):
                row, ok, dy_sum, dz_sum, _m, q, gain, factor, offset = _gradients(
                    parts, stats, of_groups, half, start, N, R, C, D, L, S, group,
                    c0, d0, batch_weight, batch_bias, BN, BD, BS,
                )  # fmt: skip
                dy_scale = gain * factor[None, :]
                x_scale = -(q * dy_scale)
                at_mean = dz_sum / L
                if BATCH:
                    slope = inv_std * d_factor / num_values
                    at_mean -= (d_shift / num_values)[None, :]
                    at_mean -= slope[None, :] * offset
                    x_scale -= (slope * factor)[None, :]
                tl.store(coef + row, dy_sum / L, mask=ok)
                tl.store(coef + R + row, dy_scale, mask=ok)
                tl.store(coef + 2 * R + row, x_scale, mask=ok)
                tl.store(coef + 3 * R + row, at_mean * factor[None, :], mask=ok)
