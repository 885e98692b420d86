// The passes over tensors of full size, for one instruction set.
//
// No include guard: batch_channel_norm.cpp includes this once for every
// instruction set, in a namespace of its own, with
//   VECTOR_BYTES             the size of a register
//   TARGET                   the attribute that has a function compiled for it
//   LOAD_HALF, STORE_HALF    its conversions of float16, if it has any
//
// There are two layouts. Rows: `count` rows of `length` values, one after the
// other. Columns: `length` positions of `count` values each (channels-last).
// Either way there are `count` coefficients of each kind, and `count` results.
// Sums are those of blocks, in the lanes of registers; blocks add up in double.

#define INLINE TARGET static inline __attribute__((always_inline))

typedef float VFloat __attribute__((vector_size(VECTOR_BYTES)));
typedef double VDouble __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t VWord __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t VMask __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t VLongMask __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t VShort __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef float VFloatHalf __attribute__((vector_size(VECTOR_BYTES / 2)));

template <class T> struct Vector { using type = VFloat; };
template <> struct Vector<double> { using type = VDouble; };
template <class T> using V = typename Vector<T>::type;
template <class T> constexpr int W = VECTOR_BYTES / sizeof(Acc<T>);
constexpr int U = 4;  // registers that a sum is spread over

// -- registers ---------------------------------------------------------------

INLINE VFloat load(const float* p) {
  VFloat v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

INLINE VDouble load(const double* p) {
  VDouble v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

INLINE VFloat load(const c10::BFloat16* p) {
  VShort bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (VFloat)(__builtin_convertvector(bits, VWord) << 16);
}

INLINE VFloat load(const c10::Half* p) {
#ifdef LOAD_HALF
  return (VFloat)LOAD_HALF(p);
#else
  VFloat v;
  for (int i = 0; i < W<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

INLINE void store(float* p, VFloat v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE void store(double* p, VDouble v) { __builtin_memcpy(p, &v, sizeof v); }

INLINE void store(c10::BFloat16* p, VFloat v) {
  // to the nearest, ties to even; NaN stays NaN
  const VWord bits = (VWord)v;
  const VWord up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VWord keep = (VWord)(v == v);
  const VWord rounded = (up & keep) | (0x7fc0 & ~keep);
  const VShort out = __builtin_convertvector(rounded, VShort);
  __builtin_memcpy(p, &out, sizeof out);
}

INLINE void store(c10::Half* p, VFloat v) {
#ifdef STORE_HALF
  STORE_HALF(p, v);
#else
  for (int i = 0; i < W<float>; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

// The sum of all lanes, in double
INLINE double total(VDouble v) {
  Pair low, high;
#if VECTOR_BYTES == 64
  Quad half[2];
  __builtin_memcpy(half, &v, sizeof v);
  half[0] += half[1];
  __builtin_memcpy(&low, half, sizeof low);
  __builtin_memcpy(&high, (const char*)half + sizeof low, sizeof high);
  low += high;
#elif VECTOR_BYTES == 32
  __builtin_memcpy(&low, &v, sizeof low);
  __builtin_memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  low += high;
#else
  low = v;
#endif
  return low[0] + low[1];
}

INLINE double total(VFloat v) {
  VFloatHalf half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return total(
      __builtin_convertvector(half[0], VDouble) +
      __builtin_convertvector(half[1], VDouble));
}

template <class VT> INLINE double total(const VT (&v)[U]) {
  return total((v[0] + v[1]) + (v[2] + v[3]));
}

// 0 where y is not above 0, d elsewhere, NaN included
INLINE VFloat through_relu(VFloat d, VFloat y) {
  return (VFloat)((VMask)d & ~(VMask)(y <= 0));
}

INLINE VDouble through_relu(VDouble d, VDouble y) {
  return (VDouble)((VLongMask)d & ~(VLongMask)(y <= 0));
}

// v where left is above right, 0 elsewhere
INLINE VFloat where_above(VFloat v, VFloat left, VFloat right) {
  return (VFloat)((VMask)v & (VMask)(left > right));
}

INLINE VDouble where_above(VDouble v, VDouble left, VDouble right) {
  return (VDouble)((VLongMask)v & (VLongMask)(left > right));
}

// -- the ends of rows --------------------------------------------------------

// The last vector of n values. It overlaps the one before; where n < W there is
// none before, and zeros are.
template <class T> INLINE V<T> load_last(const T* p, int64_t n) {
  if (n >= W<T>) return load(p + n - W<T>);
  T buffer[W<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[W<T> - n + i] = p[i];
  return load(buffer);
}

template <class T> INLINE void store_last(T* p, int64_t n, V<T> v) {
  if (n >= W<T>) return store(p + n - W<T>, v);
  T buffer[W<T>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[W<T> - n + i];
}

// 0 but in the last n lanes
INLINE VFloat only_last(VFloat v, int64_t n) {
  static const int32_t from[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                   0,  0,  0,  0,  0,  -1, -1, -1, -1, -1, -1,
                                   -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  VMask keep;
  __builtin_memcpy(&keep, from + 16 - W<float> + n, sizeof keep);
  return (VFloat)((VMask)v & keep);
}

INLINE VDouble only_last(VDouble v, int64_t n) {
  for (int64_t i = 0; i < W<double> - n; ++i) v[i] = 0;
  return v;
}

// -- rows --------------------------------------------------------------------

// Elements of a block: a lane adds up 64 of them
constexpr int64_t kBlock = 64 * U * W<float>;
// Values are summed about the first one. A sum of squares about a centre that is
// more than so many variances away loses more than two bits (of columns, four), and
// is done again about the mean.
constexpr int kFar = 4, kFarColumn = 16;

// Count, mean, and sum of squares about it, of values that come in blocks
struct Spread {
  double n, mean, squares;
};

INLINE void merge(Spread& all, const Spread& more) {
  const double step = more.mean - all.mean, share = more.n / (all.n + more.n);
  all.squares += more.squares + step * step * all.n * share;
  all.mean += step * share;
  all.n += more.n;
}

// Values that are all equal have exactly their value as mean, and no squares.
template <class T>
INLINE Spread spread_about(
    const T* x, int64_t n, double share, Acc<T> centre, bool& far) {
  constexpr int w = W<T>;
  const int64_t rest = n % w, whole = n - rest, unrolled = n - n % (U * w);
  V<T> first[U] = {}, second[U] = {};
  int64_t i = 0;
  for (; i < unrolled; i += U * w) {
    for (int k = 0; k < U; ++k) {
      const V<T> d = load(x + i + k * w) - centre;
      first[k] += d;
      second[k] += d * d;
    }
  }
  for (; i < whole; i += w) {
    const V<T> d = load(x + i) - centre;
    first[0] += d;
    second[0] += d * d;
  }
  if (rest) {
    const V<T> d = only_last(load_last(x, n) - centre, rest);
    first[1] += d;
    second[1] += d * d;
  }
  const double sum = total(first), off = sum * share;
  const double squares = total(second) - off * sum;
  far = off * sum > kFar * squares;
  return {static_cast<double>(n), centre + off, squares < 0 ? 0 : squares};
}

// `share` is 1 / n
template <class T> INLINE Spread spread_of(const T* x, int64_t n, double share) {
  bool far;
  const Spread s = spread_about(x, n, share, static_cast<Acc<T>>(x[0]), far);
  return __builtin_expect(far, 0)
      ? spread_about(x, n, share, static_cast<Acc<T>>(s.mean), far)
      : s;
}

template <class T>
TARGET void row_moments(
    const T* x, int64_t count, int64_t length, double* mean, double* var) {
  const int64_t block = std::min(kBlock, length);
  const double share = 1.0 / block, of_all = 1.0 / length;
  for (int64_t row = 0; row < count; ++row, x += length) {
    Spread all = spread_of(x, block, share);
    for (int64_t i = block; i < length; i += block) {
      const int64_t n = std::min(block, length - i);
      merge(all, spread_of(x + i, n, n == block ? share : 1.0 / n));
    }
    mean[row] = all.mean;
    var[row] = all.squares * of_all;
  }
}

template <class T, bool relu>
INLINE V<T> affine(V<T> x, V<T> mean, V<T> scale, V<T> at_mean) {
  const V<T> y = scale * (x - mean) + at_mean;
  return relu ? through_relu(y, y) : y;
}

template <class T, bool relu>
TARGET void row_apply(
    const T* x, T* y, int64_t count, int64_t length, const Acc<T>* mean,
    const Acc<T>* scale, const Acc<T>* at_mean) {
  constexpr int w = W<T>;
  const int64_t rest = length % w, whole = length - rest;
  for (int64_t row = 0; row < count; ++row, x += length, y += length) {
    const V<T> m = mean[row] - V<T>{}, a = scale[row] - V<T>{};
    const V<T> b = at_mean[row] - V<T>{};
    for (int64_t i = 0; i < whole; i += w)
      store(y + i, affine<T, relu>(load(x + i), m, a, b));
    if (rest)
      store_last(y, length, affine<T, relu>(load_last(x, length), m, a, b));
  }
}

// Sums of dy and of dy (x - mean)
template <class T, bool relu>
TARGET void row_reduce(
    const T* dy, const T* x, int64_t count, int64_t length, const Acc<T>* mean,
    const Acc<T>* scale, const Acc<T>* at_mean, double* plain, double* centred) {
  constexpr int w = W<T>;
  for (int64_t row = 0; row < count; ++row) {
    const V<T> m = mean[row] - V<T>{}, a = scale[row] - V<T>{};
    const V<T> b = at_mean[row] - V<T>{};
    double sum = 0, product = 0;
    for (int64_t start = 0; start < length; start += kBlock) {
      const int64_t n = std::min(kBlock, length - start);
      const int64_t rest = n % w, whole = n - rest, unrolled = n - n % (U * w);
      V<T> first[U] = {}, second[U] = {};
      int64_t i = 0;
      for (; i < unrolled; i += U * w) {
        for (int k = 0; k < U; ++k) {
          const V<T> e = load(x + i + k * w) - m;
          V<T> d = load(dy + i + k * w);
          if (relu) d = through_relu(d, a * e + b);
          first[k] += d;
          second[k] += d * e;
        }
      }
      for (; i < whole; i += w) {
        const V<T> e = load(x + i) - m;
        V<T> d = load(dy + i);
        if (relu) d = through_relu(d, a * e + b);
        first[0] += d;
        second[0] += d * e;
      }
      if (rest) {
        const V<T> e = load_last(x, n) - m;
        V<T> d = load_last(dy, n);
        if (relu) d = through_relu(d, a * e + b);
        first[1] += only_last(d, rest);
        second[1] += only_last(d * e, rest);
      }
      sum += total(first);
      product += total(second);
      x += n, dy += n;
    }
    plain[row] = sum;
    centred[row] = product;
  }
}

template <class T, bool relu>
INLINE V<T> gradient(
    V<T> dy, V<T> x, V<T> dy_mean, V<T> mean, V<T> dy_scale, V<T> x_scale,
    V<T> at_mean, V<T> scale, V<T> shift) {
  const V<T> e = x - mean;
  if (relu) dy = through_relu(dy, scale * e + shift);
  return dy_scale * (dy - dy_mean) + (x_scale * e + at_mean);
}

template <class T, bool relu>
TARGET void row_apply_add(
    const T* dy, const T* x, T* dx, int64_t count, int64_t length,
    const Gradient<Acc<T>>& g) {
  constexpr int w = W<T>;
  const int64_t rest = length % w, whole = length - rest;
  for (int64_t row = 0; row < count; ++row) {
    const V<T> zero{};
    const V<T> dm = g.dy_mean[row] - zero, m = g.mean[row] - zero;
    const V<T> da = g.dy_scale[row] - zero, a = g.x_scale[row] - zero;
    const V<T> b = g.at_mean[row] - zero;
    const V<T> s = relu ? g.scale[row] - zero : zero;
    const V<T> t = relu ? g.shift[row] - zero : zero;
    for (int64_t i = 0; i < whole; i += w)
      store(dx + i, gradient<T, relu>(load(dy + i), load(x + i), dm, m, da, a, b, s, t));
    if (rest)
      store_last(
          dx, length,
          gradient<T, relu>(
              load_last(dy, length), load_last(x, length), dm, m, da, a, b, s, t));
    dy += length, x += length, dx += length;
  }
}

// -- columns -----------------------------------------------------------------

// Where vector c of `count` columns is the last and not whole: `count`, else 0
template <class T> INLINE int64_t if_last(int64_t c, int64_t count) {
  return c + W<T> <= count ? 0 : count;
}

template <class T> INLINE V<T> load_at(const T* p, int64_t c, int64_t n) {
  return n ? load_last(p, n) : load(p + c);
}

template <class T> INLINE void store_at(T* p, int64_t c, int64_t n, V<T> v) {
  if (n) store_last(p, n, v);
  else store(p + c, v);
}

// Positions of a block of columns, which one lane adds up
INLINE int64_t positions_of(int64_t count) {
  return std::min<int64_t>(64, std::max<int64_t>(1, 4 * kBlock / count));
}

// Of G vectors of columns from c on: about which centre they are summed, and the
// sums of what they differ by and of its squares; likewise done again if far
template <class T, int G>
INLINE void column_spread(
    const T* x, int64_t count, int64_t length, int64_t c, int64_t n, Acc<T>* centre,
    Acc<T>* first, Acc<T>* second) {
  constexpr int w = W<T>;
  V<T> m[G], r[G], q[G];
  for (int k = 0; k < G; ++k) m[k] = load_at(x, c + k * w, n);
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (int k = 0; k < G; ++k) r[k] = q[k] = V<T>{};
    for (int64_t i = 0; i < length; ++i) {
      for (int k = 0; k < G; ++k) {
        const V<T> d = load_at(x + i * count, c + k * w, n) - m[k];
        r[k] += d;
        q[k] += d * d;
      }
    }
    if (attempt) break;
    // columns that are not far keep their centre, and so their sums
    bool far = false;
    for (int k = 0; k < G; ++k) {
      const V<T> off = r[k] / static_cast<Acc<T>>(length), lost = off * r[k];
      const V<T> step = where_above(off, lost, kFarColumn * (q[k] - lost));
      m[k] += step;
      for (int j = 0; j < w; ++j) far |= step[j] != 0;
    }
    if (!far) break;
  }
  for (int k = 0; k < G; ++k) {
    store_at(centre, c + k * w, n, m[k]);
    store_at(first, c + k * w, n, r[k]);
    store_at(second, c + k * w, n, q[k]);
  }
}

template <class T>
TARGET void column_moments(
    const T* x, int64_t count, int64_t length, double* mean, double* var) {
  std::fill(mean, mean + count, 0.0);
  std::fill(var, var + count, 0.0);
  std::vector<Acc<T>> centre(count), first(count), second(count);
  const int64_t step = positions_of(count);
  for (int64_t start = 0; start < length; start += step) {
    const int64_t stop = std::min(step, length - start);
    const T* block = x + start * count;
    int64_t c = 0;
    for (; c + U * W<T> <= count; c += U * W<T>)
      column_spread<T, U>(
          block, count, stop, c, 0, centre.data(), first.data(), second.data());
    for (; c < count; c += W<T>)
      column_spread<T, 1>(
          block, count, stop, c, if_last<T>(c, count), centre.data(), first.data(),
          second.data());
    const double part = stop, share = part / (start + part), before = start;
    for (c = 0; c < count; ++c) {
      const double off = first[c] / part;
      const double squares = second[c] - off * off * part;
      const double delta = centre[c] + off - mean[c];
      var[c] += (squares < 0 ? 0 : squares) + delta * delta * before * share;
      mean[c] += delta * share;
    }
  }
  for (int64_t c = 0; c < count; ++c) var[c] /= length;
}

template <class T, bool relu>
TARGET void column_apply(
    const T* x, T* y, int64_t count, int64_t length, const Acc<T>* mean,
    const Acc<T>* scale, const Acc<T>* at_mean) {
  for (int64_t i = 0; i < length; ++i, x += count, y += count) {
    for (int64_t c = 0; c < count; c += W<T>) {
      const int64_t n = if_last<T>(c, count);
      store_at(
          y, c, n,
          affine<T, relu>(
              load_at(x, c, n), load_at(mean, c, n), load_at(scale, c, n),
              load_at(at_mean, c, n)));
    }
  }
}

template <class T, bool relu, int G>
INLINE void column_sums(
    const T* dy, const T* x, int64_t count, int64_t length, int64_t c, int64_t n,
    const Acc<T>* mean, const Acc<T>* scale, const Acc<T>* at_mean, Acc<T>* plain,
    Acc<T>* centred) {
  constexpr int w = W<T>;
  V<T> m[G], a[G], b[G], sum[G], product[G];
  for (int k = 0; k < G; ++k) {
    m[k] = load_at(mean, c + k * w, n);
    a[k] = relu ? load_at(scale, c + k * w, n) : V<T>{};
    b[k] = relu ? load_at(at_mean, c + k * w, n) : V<T>{};
    sum[k] = product[k] = V<T>{};
  }
  for (int64_t i = 0; i < length; ++i) {
    for (int k = 0; k < G; ++k) {
      const V<T> e = load_at(x + i * count, c + k * w, n) - m[k];
      V<T> d = load_at(dy + i * count, c + k * w, n);
      if (relu) d = through_relu(d, a[k] * e + b[k]);
      sum[k] += d;
      product[k] += d * e;
    }
  }
  for (int k = 0; k < G; ++k) {
    store_at(plain, c + k * w, n, sum[k]);
    store_at(centred, c + k * w, n, product[k]);
  }
}

template <class T, bool relu>
TARGET void column_reduce(
    const T* dy, const T* x, int64_t count, int64_t length, const Acc<T>* mean,
    const Acc<T>* scale, const Acc<T>* at_mean, double* plain, double* centred) {
  std::fill(plain, plain + count, 0.0);
  std::fill(centred, centred + count, 0.0);
  std::vector<Acc<T>> first(count), second(count);
  const int64_t step = positions_of(count);
  for (int64_t start = 0; start < length; start += step) {
    const int64_t stop = std::min(step, length - start), at = start * count;
    int64_t c = 0;
    for (; c + U * W<T> <= count; c += U * W<T>)
      column_sums<T, relu, U>(
          dy + at, x + at, count, stop, c, 0, mean, scale, at_mean, first.data(),
          second.data());
    for (; c < count; c += W<T>)
      column_sums<T, relu, 1>(
          dy + at, x + at, count, stop, c, if_last<T>(c, count), mean, scale, at_mean,
          first.data(), second.data());
    for (c = 0; c < count; ++c) {
      plain[c] += first[c];
      centred[c] += second[c];
    }
  }
}

template <class T, bool relu>
TARGET void column_apply_add(
    const T* dy, const T* x, T* dx, int64_t count, int64_t length,
    const Gradient<Acc<T>>& g) {
  for (int64_t i = 0; i < length; ++i, dy += count, x += count, dx += count) {
    for (int64_t c = 0; c < count; c += W<T>) {
      const int64_t n = if_last<T>(c, count);
      const V<T> zero{};
      store_at(
          dx, c, n,
          gradient<T, relu>(
              load_at(dy, c, n), load_at(x, c, n), load_at(g.dy_mean, c, n),
              load_at(g.mean, c, n), load_at(g.dy_scale, c, n),
              load_at(g.x_scale, c, n), load_at(g.at_mean, c, n),
              relu ? load_at(g.scale, c, n) : zero,
              relu ? load_at(g.shift, c, n) : zero));
    }
  }
}

// -- the algebra of groups in one sample ---------------------------------------

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

// -- the tables --------------------------------------------------------------

template <class T> Passes<T> passes(bool columns, bool relu) {
  if (columns)
    return relu ? Passes<T>{column_moments<T>, column_apply<T, true>,
                            column_reduce<T, true>, column_apply_add<T, true>}
                : Passes<T>{column_moments<T>, column_apply<T, false>,
                            column_reduce<T, false>, column_apply_add<T, false>};
  return relu ? Passes<T>{row_moments<T>, row_apply<T, true>,
                          row_reduce<T, true>, row_apply_add<T, true>}
              : Passes<T>{row_moments<T>, row_apply<T, false>,
                          row_reduce<T, false>, row_apply_add<T, false>};
}

template <class A> Algebra<A> algebra(int64_t depth) {
  switch (depth) {
    case 2: return {stages<2, A>, stages_backward<2, A>, keep<A>};
    case 4: return {stages<4, A>, stages_backward<4, A>, keep<A>};
    case 8: return {stages<8, A>, stages_backward<8, A>, keep<A>};
    case 16: return {stages<16, A>, stages_backward<16, A>, keep<A>};
    default: return {stages<0, A>, stages_backward<0, A>, keep<A>};
  }
}

#undef INLINE
#undef TARGET
#undef VECTOR_BYTES
#undef LOAD_HALF
#undef STORE_HALF
