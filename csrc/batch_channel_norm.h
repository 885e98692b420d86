// A pass forward and a pass backward.
//
// Passes over x, and between them the algebra of bcn_mm/ops/stages.py, in double.
// Groups do not depend on each other, so a task is all of a group, which stays in
// the cache; where groups are too few, or lie across each other (channels-last), or
// their parts are too small, a task is a sample, or a part of one. Sums are added up
// in an order that does not depend on who is first.

#pragma once

#include "estimates.h"

namespace {

// -- the algebra of one group ------------------------------------------------

template <class A> struct Affine {
  const A *batch_weight, *batch_bias, *weight, *bias;  // each may be null
};

template <class A> A or_else(const A* p, int64_t i, A missing) {
  return p ? p[i] : missing;
}

// `room` has 2 D values
template <class A>
Stage stage_of(
    const Affine<A>& affine, int64_t group, int64_t depth, double eps, const A* inv_std,
    double* room) {
  Stage g{depth, eps, or_else<A>(affine.weight, group, 1),
          or_else<A>(affine.bias, group, 0), room, room + depth};
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t c = group * depth + d;
    g.factor[d] = or_else<A>(affine.batch_weight, c, 1) * static_cast<double>(inv_std[c]);
    g.shift[d] = or_else<A>(affine.batch_bias, c, 0);
  }
  return g;
}

// Of all groups; `room` has 2 C values
template <class A>
std::vector<Stage> stages_of(
    const Shape& s, const Affine<A>& affine, double eps, const A* inv_std, double* room) {
  std::vector<Stage> all(s.groups);
  for (int64_t group = 0; group < s.groups; ++group)
    all[group] = stage_of<A>(
        affine, group, s.depth(), eps, inv_std, room + 2 * group * s.depth());
  return all;
}

// What the backward pass keeps beside x: one tensor, cut up
template <class A> struct Saved {
  A *mean, *var, *offset, *inv_std;

  Saved(A* data, const Shape& s)
      : mean(data), var(data + s.rows()), offset(data + 2 * s.rows()),
        inv_std(data + 3 * s.rows()) {}
};

// -- a pass forward ----------------------------------------------------------

template <class T> struct Forward {
  using A = Acc<T>;
  const Shape& s;
  const Rule& rule;
  const Affine<A>& affine;
  Saved<A> saved;
  Buffer running_mean, running_var;
  double* batch;  // (2, C), what the batch stage normalized with; may be null
  bool repeats;   // whether that is given, and nothing moves
  A* coef;        // (2, N, C), scale and at_mean of every row; may be null

  // What `count` channels from c on are normalized with, into saved.inv_std and
  // `centre`; moves their estimates
  void batch_stage(
      int64_t c, int64_t count, const double* mean, const double* var, int64_t stride,
      double* centre) {
    const auto set = [&](int64_t d, double variance) {
      const double inv_std = 1 / std::sqrt(variance + rule.eps);
      saved.inv_std[c + d] = static_cast<A>(inv_std);
      if (!batch) return;
      batch[c + d] = centre[d];
      batch[s.channels + c + d] = inv_std;
    };
    if (repeats) {
      for (int64_t d = 0; d < count; ++d) {
        centre[d] = batch[c + d];
        saved.inv_std[c + d] = static_cast<A>(batch[s.channels + c + d]);
      }
      return;
    }
    if (!rule.training) {
      for (int64_t d = 0; d < count; ++d) {
        centre[d] = running_mean.get(c + d);
        set(d, running_var.get(c + d));
      }
      return;
    }
    std::vector<double> spread(count);
    std::fill(centre, centre + count, 0.0);
    for (int64_t n = 0; n < s.samples; ++n)
      for (int64_t d = 0; d < count; ++d) centre[d] += mean[n * stride + d];
    for (int64_t d = 0; d < count; ++d) centre[d] /= s.samples;
    for (int64_t n = 0; n < s.samples; ++n) {
      for (int64_t d = 0; d < count; ++d) {
        const double off = mean[n * stride + d] - centre[d];
        spread[d] += var[n * stride + d] + off * off;
      }
    }
    const double values = static_cast<double>(s.samples * s.length);
    for (int64_t d = 0; d < count; ++d) {
      const double variance = move<A>(
          rule, c + d, values, spread[d] / s.samples, centre[d], running_mean,
          running_var);
      set(d, variance);
    }
  }

  void run(const T* x, T* y, bool relu) {
    const int64_t depth = s.depth(), channels = s.channels;
    const int threads = threads_for(s.groups, s.size());
    const auto pass = passes<T>(s.columns, relu);
    const auto algebra_of = algebra<A>(depth);
    const auto keep = [&](int64_t row, int64_t count, const double* mean,
                          const double* var, const double* centre) {
      algebra_of.keep(
          count, mean, var, centre, saved.mean + row, saved.var + row,
          saved.offset + row);
    };
    if (s.by_group(threads)) {
      const int64_t rows = s.samples * depth, work = 2 * rows + 4 * depth;
      const Room<double> scratch(threads * work);
      const Room<A> coefs(coef ? 0 : threads * 2 * depth);
      share(s.groups, threads, [&](int64_t group, int64_t worker) {
        double *mean = scratch.at(worker * work), *var = mean + rows;
        double *centre = var + rows, *room = centre + depth;
        const int64_t first = group * depth;
        for (int64_t n = 0; n < s.samples; ++n)
          pass.moments(
              x + (n * channels + first) * s.length, depth, s.length, mean + n * depth,
              var + n * depth);
        batch_stage(first, depth, mean, var, depth, centre);
        const Stage g = stage_of<A>(affine, group, depth, rule.eps, saved.inv_std, room);
        for (int64_t n = 0; n < s.samples; ++n) {
          const int64_t row = n * channels + first;
          A* scale = coef ? coef + row : coefs.at(worker * 2 * depth);
          A* at_mean = scale + (coef ? s.rows() : depth);
          keep(row, depth, mean + n * depth, var + n * depth, centre);
          algebra_of.stages(
              &g, 1, saved.offset + row, saved.var + row, mean + n * depth,
              saved.mean + row, scale, at_mean, room + 2 * depth);
          pass.apply(
              x + row * s.length, y + row * s.length, depth, s.length, saved.mean + row,
              scale, at_mean);
        }
      });
      return;
    }
    const Room<double> scratch(2 * s.rows() + 3 * channels);
    const Room<A> coefs(coef ? 0 : 2 * s.rows());
    double *mean = scratch.at(0), *var = mean + s.rows(), *centre = var + s.rows();
    A *scale = coef ? coef : coefs.at(0), *at_mean = scale + s.rows();
    all_moments<T>(s, x, mean, var);
    share(s.groups, threads_for(s.groups, 8 * s.rows()), [&](int64_t group, int64_t) {
      const int64_t c = group * depth;
      batch_stage(c, depth, mean + c, var + c, channels, centre + c);
    });
    const auto stage = stages_of<A>(
        s, affine, rule.eps, saved.inv_std, centre + channels);
    share_samples(s, [&](int64_t n) {
      keep(n * channels, channels, mean + n * channels, var + n * channels, centre);
      const Room<double> room(depth);
      const int64_t row = n * channels;
      algebra_of.stages(
          stage.data(), s.groups, saved.offset + row, saved.var + row, mean + row,
          saved.mean + row, scale + row, at_mean + row, room.at(0));
    }, [&](int64_t row, int64_t count, int64_t length, int64_t at) {
      pass.apply(x + at, y + at, count, length, saved.mean + row, scale + row,
                 at_mean + row);
    });
  }
};

// -- a pass backward ---------------------------------------------------------

template <class A> struct Gradients {
  A *batch_weight, *batch_bias, *weight, *bias;  // each may be null
};

template <class T> struct Backward {
  using A = Acc<T>;
  const Shape& s;
  double eps;
  bool batch_statistics;
  const Affine<A>& affine;
  const Gradients<A>& grads;
  Saved<A> saved;

  // Of rows: what dx is made of; of channels and samples: what parameters get
  struct Work {
    A *dy_mean, *dy_scale, *x_scale, *at_mean;
    A *scale, *shift;         // of the pass forward, for a ReLU
    double *plain, *centred;  // row sums of dy, dy (x - mean); then dz, dz (x - mu)
    double *slope;            // x_scale, before the batch stage

    Work at(int64_t row) const {
      return {dy_mean + row, dy_scale + row, x_scale + row, at_mean + row, scale + row,
              shift + row,   plain + row,    centred + row, slope + row};
    }
    Gradient<A> gradient(const A* mean) const {
      return {dy_mean, mean, dy_scale, x_scale, at_mean, scale, shift};
    }
  };

  // The gradients of the batch stage for `count` channels from c on, and what its
  // statistics add to dx
  void batch_stage_backward(int64_t c, int64_t count, const Work& work, int64_t stride) {
    const double length = static_cast<double>(s.length), values = s.samples * length;
    std::vector<double> room(3 * count);
    double *mean = room.data(), *slope = mean + count, *factor = slope + count;
    for (int64_t n = 0; n < s.samples; ++n) {
      for (int64_t d = 0; d < count; ++d) {
        mean[d] += work.plain[n * stride + d];
        slope[d] += work.centred[n * stride + d];
      }
    }
    for (int64_t d = 0; d < count; ++d) {
      const double inv_std = saved.inv_std[c + d];
      slope[d] *= inv_std;
      if (grads.batch_weight) grads.batch_weight[c + d] = static_cast<A>(slope[d]);
      if (grads.batch_bias) grads.batch_bias[c + d] = static_cast<A>(mean[d]);
      mean[d] /= values;
      slope[d] *= inv_std / values;
      factor[d] = or_else<A>(affine.batch_weight, c + d, 1) * inv_std;
    }
    if (!batch_statistics) return;
    for (int64_t n = 0; n < s.samples; ++n) {
      const A* offset = saved.offset + n * s.channels + c;
      for (int64_t d = 0; d < count; ++d) {
        const int64_t at = n * stride + d;
        work.x_scale[at] = static_cast<A>(work.slope[at] - slope[d] * factor[d]);
        work.at_mean[at] = static_cast<A>(
            (work.plain[at] / length - mean[d] - slope[d] * offset[d]) * factor[d]);
      }
    }
  }

  void set_channel_stage(int64_t group, double d_weight, double d_bias) {
    if (grads.weight) grads.weight[group] = static_cast<A>(d_weight);
    if (grads.bias) grads.bias[group] = static_cast<A>(d_bias);
  }

  void run(const T* dy, const T* x, T* dx, bool relu) {
    const int64_t depth = s.depth(), channels = s.channels;
    const int threads = threads_for(s.groups, s.size());
    const bool whole = s.by_group(threads);
    const auto pass = passes<T>(s.columns, relu);
    const auto algebra_of = algebra<A>(depth);
    // rows of one task, and how many tasks have room of their own
    const int64_t rows = whole ? s.samples * depth : s.rows();
    const int64_t rooms = whole ? threads : 1;
    const Room<A> coefs(rooms * 6 * rows);
    const Room<double> sums(rooms * 3 * rows);
    const auto work_of = [&](int64_t worker) {
      A* a = coefs.at(worker * 6 * rows);
      double* d = sums.at(worker * 3 * rows);
      return Work{a,            a + rows,     a + 2 * rows, a + 3 * rows, a + 4 * rows,
                  a + 5 * rows, d,            d + rows,     d + 2 * rows};
    };
    // the affine of the pass forward again, whose sign a ReLU goes by
    const auto before = [&](const Stage* g, int64_t groups, int64_t row,
                            const Work& own, double* room) {
      if (!relu) return;
      algebra_of.stages(
          g, groups, saved.offset + row, saved.var + row, nullptr, saved.mean + row,
          own.scale, own.shift, room);
    };
    const auto after = [&](const Stage* g, int64_t groups, int64_t row, const Work& own,
                           double* room, double* more) {
      algebra_of.stages_backward(
          g, groups, s.length, saved.offset + row, saved.var + row, own.plain,
          own.centred, own.dy_mean, own.dy_scale, own.x_scale, own.at_mean, own.slope,
          room, more);
    };
    if (whole) {
      const Room<double> small(threads * 3 * depth);
      share(s.groups, threads, [&](int64_t group, int64_t worker) {
        double *room = small.at(worker * 3 * depth), *centred = room + 2 * depth;
        const Stage g = stage_of<A>(affine, group, depth, eps, saved.inv_std, room);
        const Work work = work_of(worker);
        const auto apply = [&](int64_t n) {
          const int64_t row = n * channels + group * depth, i = row * s.length;
          pass.apply_add(
              dy + i, x + i, dx + i, depth, s.length,
              work.at(n * depth).gradient(saved.mean + row));
        };
        double d_weight = 0, d_bias = 0;
        for (int64_t n = 0; n < s.samples; ++n) {
          const int64_t row = n * channels + group * depth, i = row * s.length;
          const Work own = work.at(n * depth);
          before(&g, 1, row, own, centred);
          pass.reduce(
              dy + i, x + i, depth, s.length, saved.mean + row, own.scale, own.shift,
              own.plain, own.centred);
          double more[2];
          after(&g, 1, row, own, centred, more);
          d_weight += more[0];
          d_bias += more[1];
          // while the sample is in the cache
          if (dx && !batch_statistics) apply(n);
        }
        set_channel_stage(group, d_weight, d_bias);
        batch_stage_backward(group * depth, depth, work, depth);
        if (dx && batch_statistics)
          for (int64_t n = 0; n < s.samples; ++n) apply(n);
      });
      return;
    }
    const Work work = work_of(0);
    const Room<double> room(2 * channels), more(2 * s.samples * s.groups);
    const auto stages = stages_of<A>(s, affine, eps, saved.inv_std, room.at(0));
    const auto before_sample = [&](int64_t n) {
      const Room<double> own(depth);
      const int64_t row = n * channels;
      before(stages.data(), s.groups, row, work.at(row), own.at(0));
    };
    const auto after_sample = [&](int64_t n) {
      const Room<double> own(depth);
      const int64_t row = n * channels;
      after(
          stages.data(), s.groups, row, work.at(row), own.at(0),
          more.at(2 * n * s.groups));
    };
    const auto reduce = [&](int64_t n) {
      const int64_t row = n * channels, i = row * s.length;
      pass.reduce(
          dy + i, x + i, channels, s.length, saved.mean + row, work.scale + row,
          work.shift + row, work.plain + row, work.centred + row);
    };
    const auto apply = [&](int64_t row, int64_t count, int64_t length, int64_t at) {
      pass.apply_add(
          dy + at, x + at, dx + at, count, length,
          work.at(row).gradient(saved.mean + row));
    };
    const auto nothing = [](int64_t, int64_t, int64_t, int64_t) {};
    // a sample at a time, while it is in the cache, unless samples are few
    const int samplewise = threads_for(s.samples, s.size());
    const bool few = samplewise < all_threads(s.size());
    const bool at_once = dx && !batch_statistics && !few;
    if (few) {
      for (int64_t n = 0; n < s.samples; ++n) before_sample(n);
      all_sums<T>(
          s, dy, x, relu, saved.mean, work.scale, work.shift, work.plain, work.centred);
      for (int64_t n = 0; n < s.samples; ++n) after_sample(n);
    } else {
      const auto all = [&](int64_t n) {
        before_sample(n);
        reduce(n);
        after_sample(n);
      };
      if (at_once) share_samples(s, all, apply);
      else share_samples(s, all, nothing);
    }
    share(s.groups, threads_for(s.groups, 8 * s.rows()), [&](int64_t group, int64_t) {
      double d_weight = 0, d_bias = 0;
      for (int64_t n = 0; n < s.samples; ++n) {
        d_weight += more[2 * (n * s.groups + group)];
        d_bias += more[2 * (n * s.groups + group) + 1];
      }
      set_channel_stage(group, d_weight, d_bias);
      const int64_t c = group * depth;
      batch_stage_backward(c, depth, work.at(c), channels);
    });
    if (dx && !at_once)
      share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at,
                         int64_t) { apply(row, count, length, at); });
  }
};

}  // namespace
