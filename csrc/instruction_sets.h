// The passes, compiled for every instruction set, and the choice when it runs.
//
// As torch chooses its own (ATEN_CPU_CAPABILITY): AVX-512, AVX2, or what every
// x86-64 and aarch64 has.

#pragma once

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

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
  void (*add)(T*, const T*, int64_t);
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
#define LOAD_WORDS(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p)))
#define LOAD_HALF(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p)))
#define STORE_HALF(p, v) \
  _mm_storeu_si128((__m128i*)(p), _mm256_cvtps_ph((__m256)(v), 0))
#include "passes.h"
}  // namespace avx2

namespace avx512 {
#define VECTOR_BYTES 64
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define LOAD_WORDS(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p)))
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

}  // namespace
