// Passes over whole tensors, shared out among threads.

#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <limits>
#include <memory>
#include <optional>

#include "instruction_sets.h"

namespace {

using at::Tensor;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 4
template <class E> using Maybe = c10::optional<E>;
#else
template <class E> using Maybe = std::optional<E>;
#endif
using MaybeTensor = Maybe<Tensor>;

at::ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class F> void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kDouble: return f(double{});
    case at::kHalf: return f(c10::Half{});
    case at::kBFloat16: return f(c10::BFloat16{});
    default: TORCH_CHECK(false, "expected a floating input, but got ", x.scalar_type());
  }
}

// Strides are not asked for: those of dimensions of size 1 mean nothing
bool is_channels_last(const Tensor& x) {
  return (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

bool is_alike(const Tensor& dy, const Tensor& x) {
  return dy.scalar_type() == x.scalar_type() && dy.sizes() == x.sizes() && dy.is_cpu() &&
         (x.is_contiguous() ? dy.is_contiguous() : is_channels_last(dy));
}

// Room for values that are yet to come
template <class E> class Room {
 public:
  explicit Room(int64_t size) : data_(new E[std::max<int64_t>(size, 1)]) {}
  E* at(int64_t i) const { return data_.get() + i; }
  E& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<E[]> data_;
};

// -- shapes and work ---------------------------------------------------------

// Elements that are not worth another thread
constexpr int64_t kSerial = 1 << 15;
// Elements that memory hands over at full speed, wherever they lie
constexpr int64_t kTogether = 1 << 12;

int threads_for(int64_t tasks, int64_t size) {
  if (size < kSerial || at::in_parallel_region()) return 1;
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), tasks));
}

// Those that a tensor of this size is worth, if there are tasks enough
int all_threads(int64_t size) {
  return threads_for(std::numeric_limits<int64_t>::max(), size);
}

struct Shape {
  int64_t samples, channels, length, groups;
  bool columns;  // channels-last; or rows of one value, which are so as well

  Shape(const Tensor& x, int64_t groups) : groups(groups) {
    TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "expected an input with values");
    samples = x.size(0);
    channels = x.size(1);
    length = x.numel() / (samples * channels);
    columns = length == 1 || !x.is_contiguous();
    TORCH_CHECK(
        x.is_contiguous() || is_channels_last(x),
        "expected a contiguous or channels-last input");
  }

  // Whether a task is better all of a group than a part of each pass in turn:
  // its values are together, and there are groups enough
  bool by_group(int threads) const {
    return !columns && threads == all_threads(size()) &&
           (samples == 1 || depth() * length >= kTogether);
  }
  int64_t rows() const { return samples * channels; }
  int64_t size() const { return rows() * length; }
  int64_t depth() const { return channels / groups; }
  // Positions of one task over columns, and how many of these a sample has
  int64_t chunk() const {
    return std::max<int64_t>(1, std::min(length, (1 << 16) / channels));
  }
  int64_t chunks() const { return (length + chunk() - 1) / chunk(); }
};

// f(task, worker) for all tasks. A worker that is done takes the next task, so
// that nobody waits for one whose core has other work.
template <class F> void share(int64_t tasks, int threads, const F& f) {
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next++) < tasks;) f(task, worker);
  });
}

// As many rows as make a task worth its while
int64_t rows_of_task(int64_t length) {
  return std::max<int64_t>(1, kSerial / length);
}

// The part of a tensor that a task over rows, or over columns, is about
template <class F> void share_parts(const Shape& s, const F& f) {
  if (s.columns) {
    // few short samples to a task, or a part of a long one
    const int64_t chunks = s.chunks();
    const int64_t step =
        chunks > 1 ? 1 : std::max<int64_t>(1, kSerial / (s.channels * s.length));
    const int64_t tasks = (s.samples * chunks + step - 1) / step;
    share(tasks, threads_for(tasks, s.size()), [&](int64_t task, int64_t) {
      const int64_t stop = std::min((task + 1) * step, s.samples * chunks);
      for (int64_t part = task * step; part < stop; ++part) {
        const int64_t sample = part / chunks, first = part % chunks * s.chunk();
        f(sample * s.channels, s.channels, std::min(s.chunk(), s.length - first),
          (sample * s.length + first) * s.channels, part);
      }
    });
    return;
  }
  const int64_t step = rows_of_task(s.length), tasks = (s.rows() + step - 1) / step;
  share(tasks, threads_for(tasks, s.size()), [&](int64_t task, int64_t) {
    const int64_t first = task * step;
    f(first, std::min(step, s.rows() - first), s.length, first * s.length, task);
  });
}

// `algebra(n)` for all samples and then `pass(row, count, length, at)` over all
// of their values: sample by sample, or in smaller parts if samples are few
template <class F, class G>
void share_samples(const Shape& s, const F& algebra, const G& pass) {
  const int threads = threads_for(s.samples, s.size());
  if (threads < all_threads(s.size())) {
    for (int64_t n = 0; n < s.samples; ++n) algebra(n);
    share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at, int64_t) {
      pass(row, count, length, at);
    });
    return;
  }
  const int64_t size = s.channels * s.length;
  const int64_t step = std::max<int64_t>(1, kSerial / size);
  const int64_t tasks = (s.samples + step - 1) / step;
  share(tasks, threads_for(tasks, s.size()), [&](int64_t task, int64_t) {
    for (int64_t n = task * step; n < std::min((task + 1) * step, s.samples); ++n) {
      algebra(n);
      pass(n * s.channels, s.channels, s.length, n * size);
    }
  });
}

// Sums over the parts of columns, merged; rows are whole already
template <class Merge>
void merge_parts(const Shape& s, const Merge& merge) {
  if (!s.columns || s.chunks() == 1) return;
  share(s.samples, threads_for(s.samples, s.rows() * s.chunks()), [&](int64_t n, int64_t) {
    merge(n);
  });
}

// Moments of all rows, (N, C) each
template <class T>
void all_moments(const Shape& s, const T* x, double* mean, double* var) {
  const auto pass = passes<T>(s.columns, false);
  const int64_t chunks = s.columns ? s.chunks() : 1, channels = s.channels;
  const Room<double> parts(chunks > 1 ? 2 * s.samples * chunks * channels : 0);
  share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at, int64_t part) {
    if (chunks == 1) return pass.moments(x + at, count, length, mean + row, var + row);
    double* to = parts.at(0) + 2 * part * channels;
    pass.moments(x + at, count, length, to, to + channels);
  });
  merge_parts(s, [&](int64_t n) {
    double *m = mean + n * channels, *v = var + n * channels;
    std::fill(m, m + channels, 0.0);
    std::fill(v, v + channels, 0.0);
    double before = 0;
    for (int64_t k = 0; k < chunks; ++k) {
      const double* from = parts.at(0) + 2 * (n * chunks + k) * channels;
      const double part = std::min(s.chunk(), s.length - k * s.chunk());
      const double share = part / (before + part);
      for (int64_t c = 0; c < channels; ++c) {
        const double step = from[c] - m[c];
        v[c] += from[channels + c] * part + step * step * before * share;
        m[c] += step * share;
      }
      before += part;
    }
    for (int64_t c = 0; c < channels; ++c) v[c] /= s.length;
  });
}

// Sums of dy and of dy (x - mean) of all rows
template <class T>
void all_sums(
    const Shape& s, const T* dy, const T* x, bool relu, const Acc<T>* mean,
    const Acc<T>* scale, const Acc<T>* at_mean, double* plain, double* centred) {
  const auto pass = passes<T>(s.columns, relu);
  const int64_t chunks = s.columns ? s.chunks() : 1, channels = s.channels;
  const Room<double> parts(chunks > 1 ? 2 * s.samples * chunks * channels : 0);
  share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at, int64_t part) {
    double *to = plain + row, *to2 = centred + row;
    if (chunks > 1) {
      to = parts.at(0) + 2 * part * channels;
      to2 = to + channels;
    }
    pass.reduce(
        dy + at, x + at, count, length, mean + row, scale + row, at_mean + row, to, to2);
  });
  merge_parts(s, [&](int64_t n) {
    double *p = plain + n * channels, *q = centred + n * channels;
    std::fill(p, p + channels, 0.0);
    std::fill(q, q + channels, 0.0);
    for (int64_t k = 0; k < chunks; ++k) {
      const double* from = parts.at(0) + 2 * (n * chunks + k) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        p[c] += from[c];
        q[c] += from[channels + c];
      }
    }
  });
}

template <class T>
void all_apply(
    const Shape& s, const T* x, T* y, bool relu, const Acc<T>* mean,
    const Acc<T>* scale, const Acc<T>* at_mean, const T* other = nullptr) {
  const auto pass = passes<T>(s.columns, relu && !other);
  const auto sum = passes<T>(s.columns, relu).add;
  share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at, int64_t) {
    if (!other)
      return pass.apply(
          x + at, y + at, count, length, mean + row, scale + row, at_mean + row);
    // a portion at a time, of which y is at hand for the sum
    const int64_t whole = s.columns ? length : count, across = s.columns ? count : length;
    const int64_t step = std::max<int64_t>(1, kSerial / across);
    for (int64_t i = 0; i < whole; i += step, at += step * across) {
      const int64_t part = std::min(step, whole - i), first = row + (s.columns ? 0 : i);
      pass.apply(
          x + at, y + at, s.columns ? count : part, s.columns ? part : length,
          mean + first, scale + first, at_mean + first);
      sum(y + at, other + at, part * across);
    }
  });
}

template <class A> Gradient<A> shifted(const Gradient<A>& g, int64_t row) {
  return {g.dy_mean + row, g.mean + row,    g.dy_scale + row, g.x_scale + row,
          g.at_mean + row, g.scale + row, g.shift + row};
}

template <class T>
void all_apply_add(
    const Shape& s, const T* dy, const T* x, T* dx, bool relu,
    const Gradient<Acc<T>>& g) {
  const auto pass = passes<T>(s.columns, relu);
  share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at, int64_t) {
    pass.apply_add(dy + at, x + at, dx + at, count, length, shifted(g, row));
  });
}

}  // namespace
