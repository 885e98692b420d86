// Passes over columns: positions of `count` values each (channels-last).
// Included by passes.h, once for every instruction set.

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
