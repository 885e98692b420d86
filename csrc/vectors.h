// Registers, and the ends of rows.
// Included by passes.h, once for every instruction set.

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
#ifdef LOAD_WORDS
  return (VFloat)((VWord)LOAD_WORDS(p) << 16);
#else
  VShort bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (VFloat)(__builtin_convertvector(bits, VWord) << 16);
#endif
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

// The bfloat16 nearest to v, ties to even, in the upper halves; NaN stays NaN
INLINE VWord rounded(VFloat v) {
  const VWord bits = (VWord)v;
  return (bits + 0x7fff + ((bits >> 16) & 1)) | (VWord)(v != v);
}

INLINE void store(c10::BFloat16* p, VFloat v) {
  const VShort out = __builtin_convertvector(rounded(v) >> 16, VShort);
  __builtin_memcpy(p, &out, sizeof out);
}

INLINE void store(c10::Half* p, VFloat v) {
#ifdef STORE_HALF
  STORE_HALF(p, v);
#else
  for (int i = 0; i < W<float>; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

// Two vectors, in an order that only store_pair knows: bfloat16 is taken apart into
// the lower and the upper halves of words, which needs no shuffling.
template <class T> INLINE void load_pair(const T* p, V<T>& a, V<T>& b) {
  a = load(p);
  b = load(p + W<T>);
}

INLINE void load_pair(const c10::BFloat16* p, VFloat& a, VFloat& b) {
  VWord words;
  __builtin_memcpy(&words, p, sizeof words);
  a = (VFloat)(words << 16);
  b = (VFloat)(words & 0xffff0000);
}

template <class T> INLINE void store_pair(T* p, V<T> a, V<T> b) {
  store(p, a);
  store(p + W<T>, b);
}

INLINE void store_pair(c10::BFloat16* p, VFloat a, VFloat b) {
  const VWord words = (rounded(a) >> 16) | (rounded(b) & 0xffff0000);
  __builtin_memcpy(p, &words, sizeof words);
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
