// Batch-Channel Normalization and Weight Standardization on the CPU.
//
// A pass forward and a pass backward are one operator each: passes over x
// (passes.h), and between them the algebra of bcn_mm/ops/estimates.py and
// stages.py, in double. Groups do not depend on each other, so a task is all of
// a group, which stays in the cache; where groups are too few, or lie across
// each other (channels-last), each pass is shared out by itself. Results do not
// depend on the number of threads.
//
// The instruction set is chosen when it runs, as torch chooses its own
// (ATEN_CPU_CAPABILITY): AVX-512, AVX2, or what every x86-64 and aarch64 has.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 4
template <class E> using Maybe = c10::optional<E>;
#else
template <class E> using Maybe = std::optional<E>;
#endif
using MaybeTensor = Maybe<Tensor>;

typedef double Pair __attribute__((vector_size(16)));
typedef double Quad __attribute__((vector_size(32)));

template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
// In which values of type T are computed with
template <class T> using Acc = typename Accumulator<T>::type;

// Coefficients of dx = dy_scale (dy - dy_mean) + x_scale (x - mean) + at_mean;
// with a ReLU, dy counts where scale (x - mean) + shift is above 0
template <class A> struct Gradient {
  const A *dy_mean, *mean, *dy_scale, *x_scale, *at_mean, *scale, *shift;
};

// Of one group, the same in all samples
struct Stage {
  int64_t depth;   // D channels
  double eps, weight, bias;
  double* factor;  // (D): batch_weight / std of the batch stage
  double* shift;   // (D): batch_bias
};

template <class T> struct Passes {
  void (*moments)(const T*, int64_t, int64_t, double*, double*);
  void (*apply)(
      const T*, T*, int64_t, int64_t, const Acc<T>*, const Acc<T>*, const Acc<T>*);
  void (*reduce)(
      const T*, const T*, int64_t, int64_t, const Acc<T>*, const Acc<T>*,
      const Acc<T>*, double*, double*);
  void (*apply_add)(
      const T*, const T*, T*, int64_t, int64_t, const Gradient<Acc<T>>&);
};

template <class A> struct Algebra {
  void (*stages)(
      const Stage*, int64_t, const A*, const A*, const double*, const A*, A*, A*,
      double*);
  void (*stages_backward)(
      const Stage*, int64_t, double, const A*, const A*, double*, double*, A*, A*, A*,
      A*, double*, double*, double*);
  void (*keep)(int64_t, const double*, const double*, const double*, A*, A*, A*);
};

namespace baseline {
#define VECTOR_BYTES 16
#define TARGET
#include "passes.h"
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
#define VECTOR_BYTES 32
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LOAD_HALF(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p)))
#define STORE_HALF(p, v) \
  _mm_storeu_si128((__m128i*)(p), _mm256_cvtps_ph((__m256)(v), 0))
#include "passes.h"
}  // namespace avx2

namespace avx512 {
#define VECTOR_BYTES 64
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define LOAD_HALF(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p)))
#define STORE_HALF(p, v) \
  _mm256_storeu_si256((__m256i*)(p), _mm512_cvtps_ph((__m512)(v), 0))
#include "passes.h"
}  // namespace avx512
#endif

const std::string& capability() {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 1
  static const std::string name = "DEFAULT";  // which does not say
#else
  static const std::string name = at::get_cpu_capability();
#endif
  return name;
}

template <class T> Passes<T> passes(bool columns, bool relu) {
#if defined(__x86_64__)
  if (capability() == "AVX512") return avx512::passes<T>(columns, relu);
  if (capability() == "AVX2") return avx2::passes<T>(columns, relu);
#endif
  return baseline::passes<T>(columns, relu);
}

template <class A> Algebra<A> algebra(int64_t depth) {
#if defined(__x86_64__)
  if (capability() == "AVX512") return avx512::algebra<A>(depth);
  if (capability() == "AVX2") return avx2::algebra<A>(depth);
#endif
  return baseline::algebra<A>(depth);
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
        x.is_non_overlapping_and_dense() && (!columns || x.stride(1) == 1),
        "expected a contiguous or channels-last input");
  }

  // Whether a task is better all of a group than a part of each pass in turn:
  // its values are together, and there are groups enough
  bool by_group(int threads) const {
    return !columns && (threads == 1 || threads == at::get_num_threads()) &&
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

int threads_for(int64_t tasks, int64_t size) {
  if (size < kSerial || at::in_parallel_region()) return 1;
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), tasks));
}

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
  if (threads > 1 && threads < at::get_num_threads()) {
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
    const Acc<T>* scale, const Acc<T>* at_mean) {
  const auto pass = passes<T>(s.columns, relu);
  share_parts(s, [&](int64_t row, int64_t count, int64_t length, int64_t at, int64_t) {
    pass.apply(x + at, y + at, count, length, mean + row, scale + row, at_mean + row);
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

// -- the estimates -----------------------------------------------------------

// How a pass moves them: bcn_mm.ops.estimates.Rule, and what follows from it
struct Rule {
  bool training, estimate;
  double eps;
  double rate = 0;   // how far they move
  double large = 0;  // the same where it is above the momentum, else 0
};

Rule rule_of(
    bool training, bool estimate, Maybe<double> momentum,
    const std::string& start, double eps, const MaybeTensor& passes) {
  Rule rule{training, estimate, eps};
  if (!training) return rule;
  double number = 1;
  if (passes) {
    // the caller's layer counts from one; bumped as in-place operators do
    int64_t& count = *passes->data_ptr<int64_t>();
    number = static_cast<double>(++count);
  }
  if (momentum && start == "identity") {
    rule.rate = *momentum;
    return rule;
  }
  TORCH_CHECK(passes, "momentum and start need num_batches_tracked");
  const double floor = momentum.value_or(0);
  rule.rate = !momentum || start == "average" ? 1 / number : number == 1;
  rule.rate = std::max(rule.rate, floor);
  rule.large = rule.rate > floor ? rule.rate : 0;
  return rule;
}

// A running statistic of any dtype
class Buffer {
 public:
  explicit Buffer(const Tensor& t)
      : data_(t.data_ptr()), type_(t.scalar_type()), stride_(t.dim() ? t.stride(0) : 0) {}

  double get(int64_t c) const {
    switch (type_) {
      case at::kFloat: return get_as<float>(c);
      case at::kDouble: return get_as<double>(c);
      case at::kHalf: return get_as<c10::Half>(c);
      default: return get_as<c10::BFloat16>(c);
    }
  }

  // What it would hold of a value
  double rounded(double value) const {
    switch (type_) {
      case at::kFloat: return static_cast<float>(value);
      case at::kDouble: return value;
      case at::kHalf: return static_cast<c10::Half>(static_cast<float>(value));
      default: return static_cast<c10::BFloat16>(static_cast<float>(value));
    }
  }

  void set(int64_t c, double value) {
    switch (type_) {
      case at::kFloat: set_as<float>(c, value); break;
      case at::kDouble: set_as<double>(c, value); break;
      case at::kHalf: set_as<c10::Half>(c, value); break;
      default: set_as<c10::BFloat16>(c, value); break;
    }
  }

 private:
  template <class B> double get_as(int64_t c) const {
    return static_cast<double>(static_cast<const B*>(data_)[c * stride_]);
  }
  template <class B> void set_as(int64_t c, double value) {
    static_cast<B*>(data_)[c * stride_] = static_cast<B>(value);
  }

  void* data_;
  at::ScalarType type_;
  int64_t stride_;
};

// Moves the estimates of channel c, and returns the variance that it is
// normalized with; `centre` is that of its batch, and becomes the mean for it.
template <class A>
double move(
    const Rule& rule, int64_t c, double values, double spread, double& centre,
    Buffer& running_mean, Buffer& running_var) {
  const double old_mean = running_mean.get(c), old_var = running_var.get(c);
  double target = spread;
  if (rule.estimate) {
    target -= rule.large * (centre - old_mean) * (centre - old_mean);
  } else {
    target *= values / std::max(values - 1, 1.0);  // unbiased, as BatchNorm's
  }
  // a channel that is not finite, in the dtype of statistics or of the buffers,
  // stays as it is
  if (std::isfinite(static_cast<A>(centre)) && std::isfinite(static_cast<A>(target)) &&
      std::isfinite(running_mean.rounded(centre)) &&
      std::isfinite(running_var.rounded(target))) {
    running_mean.set(c, old_mean + rule.rate * (centre - old_mean));
    running_var.set(c, old_var + rule.rate * (target - old_var));
  }
  if (!rule.estimate) return spread;
  centre = running_mean.get(c);
  return running_var.get(c);
}

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
    std::vector<double> room(2 * count);
    double *spread = room.data(), *about = spread + count;
    std::fill(centre, centre + count, 0.0);
    for (int64_t n = 0; n < s.samples; ++n)
      for (int64_t d = 0; d < count; ++d) centre[d] += mean[n * stride + d];
    for (int64_t d = 0; d < count; ++d) {
      centre[d] /= s.samples;
      about[d] = rule.estimate ? running_mean.get(c + d) : centre[d];
    }
    for (int64_t n = 0; n < s.samples; ++n) {
      for (int64_t d = 0; d < count; ++d) {
        const double off = mean[n * stride + d] - about[d];
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
      const Room<A> coefs(threads * 2 * depth);
      share(s.groups, threads, [&](int64_t group, int64_t worker) {
        double *mean = scratch.at(worker * work), *var = mean + rows;
        double *centre = var + rows, *room = centre + depth;
        A *scale = coefs.at(worker * 2 * depth), *at_mean = scale + depth;
        const int64_t first = group * depth;
        for (int64_t n = 0; n < s.samples; ++n)
          pass.moments(
              x + (n * channels + first) * s.length, depth, s.length, mean + n * depth,
              var + n * depth);
        batch_stage(first, depth, mean, var, depth, centre);
        const Stage g = stage_of<A>(affine, group, depth, rule.eps, saved.inv_std, room);
        for (int64_t n = 0; n < s.samples; ++n) {
          const int64_t row = n * channels + first;
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
    const Room<A> coefs(2 * s.rows());
    double *mean = scratch.at(0), *var = mean + s.rows(), *centre = var + s.rows();
    A *scale = coefs.at(0), *at_mean = scale + s.rows();
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
    const bool few = samplewise > 1 && samplewise < at::get_num_threads();
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

// -- operators ---------------------------------------------------------------

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

template <class A> const A* data_of(const MaybeTensor& t, int64_t size) {
  if (!t) return nullptr;
  TORCH_CHECK(
      t->numel() == size && t->scalar_type() == c10::CppTypeToScalarType<A>::value &&
          t->is_contiguous() && t->is_cpu(),
      "expected a contiguous CPU tensor of ", size, " values in the dtype of statistics");
  return static_cast<const A*>(t->data_ptr());
}

template <class A>
Affine<A> affine_of(
    const Shape& s, const MaybeTensor& batch_weight, const MaybeTensor& batch_bias,
    const MaybeTensor& weight, const MaybeTensor& bias) {
  return {
      data_of<A>(batch_weight, s.channels), data_of<A>(batch_bias, s.channels),
      data_of<A>(weight, s.groups), data_of<A>(bias, s.groups)};
}

Tensor empty_saved(const Tensor& x) {
  return at::empty(
      {3 * x.size(0) * x.size(1) + x.size(1)}, x.options().dtype(statistics_type(x)));
}

void moved(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void check_alike(const Tensor& dy, const Tensor& x) {
  TORCH_CHECK(
      dy.scalar_type() == x.scalar_type() && dy.sizes() == x.sizes() && dy.is_cpu() &&
          (x.is_contiguous() ? dy.is_contiguous() : dy.strides() == x.strides()),
      "expected a gradient of the dtype, shape and layout of the input");
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
    const MaybeTensor& num_batches_tracked, const MaybeTensor& batch_weight,
    const MaybeTensor& batch_bias, const MaybeTensor& weight, const MaybeTensor& bias,
    int64_t num_groups, double eps, bool relu, bool training, bool estimate,
    Maybe<double> momentum, std::string start, const MaybeTensor& batch,
    bool repeats) {
  const Shape s(x, num_groups);
  TORCH_CHECK(
      running_mean.is_cpu() && running_var.is_cpu() &&
          running_mean.numel() == s.channels && running_var.numel() == s.channels &&
          running_mean.is_floating_point() &&
          running_mean.scalar_type() == running_var.scalar_type(),
      "expected running statistics of ", s.channels, " channels, on the CPU");
  Tensor y = at::empty_like(x), saved = empty_saved(x);
  const bool moves = training && !repeats;
  const Rule rule = rule_of(
      moves, estimate, momentum, start, eps,
      num_batches_tracked);
  double* data = const_cast<double*>(data_of<double>(batch, 2 * s.channels));
  TORCH_CHECK(data || !repeats, "a pass that repeats another needs its batch");
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto affine = affine_of<A>(s, batch_weight, batch_bias, weight, bias);
    Forward<T>{s, rule, affine, Saved<A>(static_cast<A*>(saved.data_ptr()), s),
               Buffer(running_mean), Buffer(running_var), data, repeats}
        .run(static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()), relu);
  });
  if (moves) {
    moved(running_mean);
    moved(running_var);
    if (num_batches_tracked) moved(*num_batches_tracked);
  }
  return {y, saved};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Undefined, which is None in Python, where there is no such parameter
Tensor like(const MaybeTensor& t) { return t ? at::empty_like(*t) : Tensor(); }

Five backward(
    const Tensor& dy, const Tensor& x, const Tensor& saved,
    const MaybeTensor& batch_weight, const MaybeTensor& batch_bias,
    const MaybeTensor& weight, const MaybeTensor& bias, int64_t num_groups, double eps,
    bool relu, bool batch_statistics, bool needs_dx) {
  const Shape s(x, num_groups);
  check_alike(dy, x);
  Tensor dx = needs_dx ? at::empty_like(x) : Tensor();
  Tensor d_batch_weight = like(batch_weight), d_batch_bias = like(batch_bias);
  Tensor d_weight = like(weight), d_bias = like(weight);  // given together
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto affine = affine_of<A>(s, batch_weight, batch_bias, weight, bias);
    const auto data = [](Tensor& t) {
      return t.defined() ? static_cast<A*>(t.data_ptr()) : nullptr;
    };
    const Gradients<A> grads{
        data(d_batch_weight), data(d_batch_bias), data(d_weight), data(d_bias)};
    Backward<T>{s, eps, batch_statistics, affine, grads,
                Saved<A>(static_cast<A*>(saved.data_ptr()), s)}
        .run(
            static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(x.data_ptr()),
            needs_dx ? static_cast<T*>(dx.data_ptr()) : nullptr, relu);
  });
  return {dx, d_batch_weight, d_batch_bias, d_weight, d_bias};
}

// The passes by themselves, (N, C) coefficients between them

Tensor empty_rows(const Tensor& x) {
  return at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Shape s(x, 1);
  const auto options = x.options().dtype(statistics_type(x));
  Tensor mean = empty_rows(x), var = empty_rows(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    all_moments<T>(
        s, static_cast<const T*>(x.data_ptr()), static_cast<double*>(mean.data_ptr()),
        static_cast<double*>(var.data_ptr()));
  });
  return {mean.to(options), var.to(options)};
}

Tensor apply(
    const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& at_mean) {
  const Shape s(x, 1);
  Tensor y = at::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    all_apply<T>(
        s, static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()), false,
        data_of<A>(mean, s.rows()), data_of<A>(scale, s.rows()),
        data_of<A>(at_mean, s.rows()));
  });
  return y;
}

std::tuple<Tensor, Tensor> reduce(const Tensor& dy, const Tensor& x, const Tensor& mean) {
  const Shape s(x, 1);
  check_alike(dy, x);
  Tensor plain = empty_rows(x), centred = empty_rows(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const A* m = data_of<A>(mean, s.rows());
    all_sums<T>(
        s, static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(x.data_ptr()),
        false, m, m, m, static_cast<double*>(plain.data_ptr()),
        static_cast<double*>(centred.data_ptr()));
  });
  return {plain.to(mean.options()), centred.to(mean.options())};
}

Tensor apply_add(
    const Tensor& dy, const Tensor& x, const Tensor& dy_mean, const Tensor& mean,
    const Tensor& dy_scale, const Tensor& x_scale, const Tensor& at_mean) {
  const Shape s(x, 1);
  check_alike(dy, x);
  Tensor dx = at::empty_like(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const int64_t rows = s.rows();
    const A* m = data_of<A>(mean, rows);
    all_apply_add<T>(
        s, static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(x.data_ptr()),
        static_cast<T*>(dx.data_ptr()), false,
        {data_of<A>(dy_mean, rows), m, data_of<A>(dy_scale, rows),
         data_of<A>(x_scale, rows), data_of<A>(at_mean, rows), m, m});
  });
  return dx;
}

}  // namespace

#include "weight_standardization.h"

namespace {

// -- of the shapes alone -----------------------------------------------------

std::tuple<Tensor, Tensor> fake_forward(
    const Tensor& x, const Tensor&, const Tensor&, const MaybeTensor&,
    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
    int64_t, double, bool, bool, bool, Maybe<double>, std::string,
    const MaybeTensor&, bool) {
  return {at::empty_like(x), empty_saved(x)};
}

Five fake_backward(
    const Tensor&, const Tensor& x, const Tensor&, const MaybeTensor& batch_weight,
    const MaybeTensor& batch_bias, const MaybeTensor& weight, const MaybeTensor&,
    int64_t, double, bool, bool, bool needs_dx) {
  return {needs_dx ? at::empty_like(x) : Tensor(), like(batch_weight),
          like(batch_bias), like(weight), like(weight)};
}

std::tuple<Tensor, Tensor> fake_rows(const Tensor& x) {
  const auto options = x.options().dtype(statistics_type(x));
  return {at::empty({x.size(0), x.size(1)}, options),
          at::empty({x.size(0), x.size(1)}, options)};
}

std::tuple<Tensor, Tensor> fake_reduce(const Tensor&, const Tensor& x, const Tensor&) {
  return fake_rows(x);
}

Tensor fake_apply(const Tensor& x, const Tensor&, const Tensor&, const Tensor&) {
  return at::empty_like(x);
}

Tensor fake_apply_add(
    const Tensor&, const Tensor& x, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&) {
  return at::empty_like(x);
}

}  // namespace

TORCH_LIBRARY(bcn_mm_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor? batch_weight, Tensor? batch_bias, "
      "Tensor? weight, Tensor? bias, int num_groups, float eps, bool relu, "
      "bool training, bool estimate, float? momentum, str start, Tensor(d!)? batch, "
      "bool repeats) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor saved, Tensor? batch_weight, "
      "Tensor? batch_bias, Tensor? weight, Tensor? bias, int num_groups, float eps, "
      "bool relu, bool batch_statistics, bool needs_dx) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("moments(Tensor x) -> (Tensor, Tensor)");
  m.def("apply(Tensor x, Tensor mean, Tensor scale, Tensor at_mean) -> Tensor");
  m.def("reduce(Tensor dy, Tensor x, Tensor mean) -> (Tensor, Tensor)");
  m.def(
      "apply_add(Tensor dy, Tensor x, Tensor dy_mean, Tensor mean, Tensor dy_scale, "
      "Tensor x_scale, Tensor at_mean) -> Tensor");
  m.def(
      "standardize(Tensor weight, float eps, bool unbiased, bool under_root) "
      "-> (Tensor, Tensor)");
  m.def("standardize_backward(Tensor grad, Tensor weight, Tensor saved) -> Tensor");
  m.def("capability() -> str", [] { return capability(); });
}

TORCH_LIBRARY_IMPL(bcn_mm_cpu, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
  m.impl("moments", moments);
  m.impl("apply", apply);
  m.impl("reduce", reduce);
  m.impl("apply_add", apply_add);
  m.impl("standardize", standardize);
  m.impl("standardize_backward", standardize_backward);
}

TORCH_LIBRARY_IMPL(bcn_mm_cpu, Meta, m) {
  m.impl("forward", fake_forward);
  m.impl("backward", fake_backward);
  m.impl("moments", fake_rows);
  m.impl("apply", fake_apply);
  m.impl("reduce", fake_reduce);
  m.impl("apply_add", fake_apply_add);
  m.impl("standardize", fake_standardize);
  m.impl("standardize_backward", fake_standardize_backward);
}
