// The algebra of groups in one sample.
// Included by passes.h, once for every instruction set.

// The channels of a group, D or, if that is 0, as many as the stage says; the
// numbers that are common have code of their own
template <int D> INLINE int64_t depth_of(const Stage& g) { return D ? D : g.depth; }

// z about the mean of the group, into `centred`; returns 1 / std of the group
template <int D, class A>
INLINE double channel_stage(
    const Stage& g, const A* __restrict offset, const A* __restrict var,
    double* __restrict centred) {
  const int64_t depth = depth_of<D>(g);
  const double *__restrict factor = g.factor, *__restrict shift = g.shift;
  const double share = 1.0 / depth;
  double mean = 0, spread = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t d = 0; d < depth; ++d) {
    centred[d] = shift[d] + offset[d] * factor[d];
    mean += centred[d];
  }
  mean *= share;
#pragma omp simd reduction(+ : spread)
  for (int64_t d = 0; d < depth; ++d) {
    centred[d] -= mean;
    spread += var[d] * factor[d] * factor[d] + centred[d] * centred[d];
  }
  return 1 / std::sqrt(spread * share + g.eps);
}

// Both stages as y = scale (x - kept) + at_mean, where `kept` is the rounded
// mean: the constant makes good for that, unless `mean` is null
template <int D, class A>
TARGET void stages(
    const Stage* all, int64_t groups, const A* __restrict offset,
    const A* __restrict var, const double* __restrict mean, const A* __restrict kept,
    A* __restrict scale, A* __restrict at_mean, double* __restrict centred) {
  for (int64_t i = 0; i < groups; ++i) {
    const Stage& g = all[i];
    const int64_t depth = depth_of<D>(g);
    const double gain = channel_stage<D>(g, offset, var, centred) * g.weight;
    const double* __restrict factor = g.factor;
    const double bias = g.bias;
    if (mean) {
#pragma omp simd
      for (int64_t d = 0; d < depth; ++d) {
        const double slope = gain * factor[d];
        scale[d] = static_cast<A>(slope);
        at_mean[d] = static_cast<A>(
            bias + centred[d] * gain + slope * (kept[d] - mean[d]));
      }
      mean += depth;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < depth; ++d) {
        scale[d] = static_cast<A>(gain * factor[d]);
        at_mean[d] = static_cast<A>(bias + centred[d] * gain);
      }
    }
    offset += depth, var += depth, kept += depth, scale += depth, at_mean += depth;
  }
}

// From row sums of dy and dy (x - mean), `plain` and `moment`, to what dx is made
// of, but for what batch statistics add to `slope` and `at_mean`; they become row
// sums of dz and of dz (x - mu). `more` gets what each weight and bias does.
template <int D, class A>
TARGET void stages_backward(
    const Stage* all, int64_t groups, double length, const A* __restrict offset,
    const A* __restrict var, double* __restrict plain, double* __restrict moment,
    A* __restrict dy_mean, A* __restrict dy_scale, A* __restrict x_scale,
    A* __restrict at_mean, double* __restrict slope, double* __restrict centred,
    double* __restrict more) {
  const double share = 1 / length;
  for (int64_t i = 0; i < groups; ++i) {
    const Stage& g = all[i];
    const int64_t depth = depth_of<D>(g);
    const double inv_std = channel_stage<D>(g, offset, var, centred);
    const double gain = inv_std * g.weight;
    const double* __restrict factor = g.factor;
    double along = 0, sum = 0;
#pragma omp simd reduction(+ : along, sum)
    for (int64_t d = 0; d < depth; ++d) {
      along += centred[d] * plain[d] + moment[d] * factor[d];
      sum += plain[d];
    }
    const double one = share / depth;
    const double q = inv_std * inv_std * along * one, p = sum * one;
#pragma omp simd
    for (int64_t d = 0; d < depth; ++d) {
      const double total = plain[d], q_row = q * factor[d], scale = gain * factor[d];
      const double dz = (total - length * (p + centred[d] * q)) * gain;
      dy_mean[d] = static_cast<A>(total / length);
      dy_scale[d] = static_cast<A>(scale);
      slope[d] = -q_row * scale;
      x_scale[d] = static_cast<A>(-q_row * scale);
      at_mean[d] = static_cast<A>(dz * share * factor[d]);
      plain[d] = dz;
      moment[d] = (moment[d] - length * q_row * var[d]) * gain + offset[d] * dz;
    }
    more[2 * i] = along * inv_std;
    more[2 * i + 1] = sum;
    offset += depth, var += depth, plain += depth, moment += depth;
    dy_mean += depth, dy_scale += depth, x_scale += depth, at_mean += depth;
    slope += depth;
  }
}

// What the backward pass will know of `count` rows
template <class A>
TARGET void keep(
    int64_t count, const double* __restrict mean, const double* __restrict var,
    const double* __restrict centre, A* __restrict kept_mean, A* __restrict kept_var,
    A* __restrict offset) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) {
    kept_mean[d] = static_cast<A>(mean[d]);
    kept_var[d] = static_cast<A>(var[d]);
    offset[d] = static_cast<A>(mean[d] - centre[d]);
  }
}
