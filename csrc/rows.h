// Passes over rows: values that lie one after the other.
// Included by passes.h, once for every instruction set.

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
    V<T> d[U];
    for (int k = 0; k < U; k += 2) load_pair(x + i + k * w, d[k], d[k + 1]);
    for (int k = 0; k < U; ++k) {
      d[k] -= centre;
      first[k] += d[k];
      second[k] += d[k] * d[k];
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
  const int64_t rest = length % w, whole = length - rest, paired = whole - whole % (2 * w);
  for (int64_t row = 0; row < count; ++row, x += length, y += length) {
    const V<T> m = mean[row] - V<T>{}, a = scale[row] - V<T>{};
    const V<T> b = at_mean[row] - V<T>{};
    for (int64_t i = 0; i < paired; i += 2 * w) {
      V<T> even, odd;
      load_pair(x + i, even, odd);
      store_pair(y + i, affine<T, relu>(even, m, a, b), affine<T, relu>(odd, m, a, b));
    }
    if (paired < whole)
      store(y + paired, affine<T, relu>(load(x + paired), m, a, b));
    if (rest)
      store_last(y, length, affine<T, relu>(load_last(x, length), m, a, b));
  }
}

template <class T, bool relu> INLINE V<T> sum(V<T> a, V<T> b) {
  const V<T> s = a + b;
  return relu ? through_relu(s, s) : s;
}

// y += other, and a ReLU of that
template <class T, bool relu>
TARGET void add(T* y, const T* other, int64_t n) {
  constexpr int w = W<T>;
  int64_t i = 0;
  for (; i + 2 * w <= n; i += 2 * w) {
    V<T> a[2], b[2];
    load_pair(y + i, a[0], a[1]);
    load_pair(other + i, b[0], b[1]);
    store_pair(y + i, sum<T, relu>(a[0], b[0]), sum<T, relu>(a[1], b[1]));
  }
  for (; i < n; i += w) {
    const int64_t m = std::min<int64_t>(w, n - i);
    T left[W<T>] = {}, right[W<T>] = {};
    std::copy_n(y + i, m, left);
    std::copy_n(other + i, m, right);
    store(left, sum<T, relu>(load(left), load(right)));
    std::copy_n(left, m, y + i);
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
        V<T> d[U], e[U];
        for (int k = 0; k < U; k += 2) {
          load_pair(x + i + k * w, e[k], e[k + 1]);
          load_pair(dy + i + k * w, d[k], d[k + 1]);
        }
        for (int k = 0; k < U; ++k) {
          e[k] -= m;
          if (relu) d[k] = through_relu(d[k], a * e[k] + b);
          first[k] += d[k];
          second[k] += d[k] * e[k];
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
  const int64_t rest = length % w, whole = length - rest, paired = whole - whole % (2 * w);
  for (int64_t row = 0; row < count; ++row) {
    const V<T> zero{};
    const V<T> dm = g.dy_mean[row] - zero, m = g.mean[row] - zero;
    const V<T> da = g.dy_scale[row] - zero, a = g.x_scale[row] - zero;
    const V<T> b = g.at_mean[row] - zero;
    const V<T> s = relu ? g.scale[row] - zero : zero;
    const V<T> t = relu ? g.shift[row] - zero : zero;
    const auto at = [&](V<T> d, V<T> v) __attribute__((always_inline)) TARGET {
      return gradient<T, relu>(d, v, dm, m, da, a, b, s, t);
    };
    for (int64_t i = 0; i < paired; i += 2 * w) {
      V<T> d, more_d, v, more_v;
      load_pair(dy + i, d, more_d);
      load_pair(x + i, v, more_v);
      store_pair(dx + i, at(d, v), at(more_d, more_v));
    }
    if (paired < whole) store(dx + paired, at(load(dy + paired), load(x + paired)));
    if (rest) store_last(dx, length, at(load_last(dy, length), load_last(x, length)));
    dy += length, x += length, dx += length;
  }
}
