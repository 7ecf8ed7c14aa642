// SPDX-License-Identifier: MIT
// Vectors of the instruction set in use: the compiler's own (GCC and Clang) and no intrinsics, so that the same text
// serves every processor. Included by dcnv3_kernels.h alone, which says what is defined before.

namespace internimage {
namespace INTERNIMAGE_ISA {

#define INTERNIMAGE_INLINE inline __attribute__((always_inline))
#define INTERNIMAGE_NOINLINE __attribute__((noinline))  // what runs once a strip: one copy serves all its callers

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

template <typename T>
constexpr int kLanes = INTERNIMAGE_VECTOR_BYTES / sizeof(T);

// The integer of the same width.
template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <typename V>
INTERNIMAGE_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
INTERNIMAGE_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <typename T, int N>
INTERNIMAGE_INLINE Vector<T, N> broadcast(T value) {
  return value - Vector<T, N>{};
}

// ---- storage types

// The half types in memory. Types of their own, so that uint16_t is never mistaken for them.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// The types with code of their own for the shapes of InternImage; the others make do with the general code, for the
// binary's size.
template <typename S>
constexpr bool kIsFast = false;
template <>
constexpr bool kIsFast<float> = true;
template <>
constexpr bool kIsFast<Bf16> = true;

// Storage S <-> compute type T, N lanes at a time.
template <typename S, typename T, int N>
struct Convert {
  static INTERNIMAGE_INLINE Vector<T, N> load(const S* from) { return INTERNIMAGE_ISA::load<Vector<T, N>>(from); }
  static INTERNIMAGE_INLINE void store(S* to, Vector<T, N> v) { INTERNIMAGE_ISA::store(to, v); }
};

template <int N>
struct Convert<Bf16, float, N> {
  static INTERNIMAGE_INLINE Vector<float, N> load(const Bf16* from) {
    const auto half = INTERNIMAGE_ISA::load<Vector<uint16_t, N>>(from);
    const Vector<uint32_t, N> bits = __builtin_convertvector(half, Vector<uint32_t, N>) << 16;
    return (Vector<float, N>)bits;
  }
  static INTERNIMAGE_INLINE void store(Bf16* to, Vector<float, N> v) {
    // To nearest even. A NaN needs no care: it comes from a Bf16 or from the processor, so that its lower half is zero,
    // and what is added there does not reach the upper one.
    Vector<uint32_t, N> bits = (Vector<uint32_t, N>)v;
    bits += 0x7fff + ((bits >> 16) & 1);
    INTERNIMAGE_ISA::store(to, __builtin_convertvector(bits >> 16, Vector<uint16_t, N>));
  }
};

template <int N>
struct Convert<Fp16, float, N> {
  using F = Vector<float, N>;
  using U = Vector<uint32_t, N>;
  static INTERNIMAGE_INLINE F load(const Fp16* from) {
    const U bits = __builtin_convertvector(INTERNIMAGE_ISA::load<Vector<uint16_t, N>>(from), U);
    const U magnitude = bits & 0x7fff;
    // exponent and fraction in their places in a float, 112 too low in the exponent; the product also makes the
    // subnormal numbers right
    const F finite = (F)(magnitude << 13) * 0x1p112f;
    const U special = 0x7f800000 | (magnitude << 13);
    return (F)((magnitude >= 0x7c00 ? special : (U)finite) | (bits & 0x8000) << 16);
  }
  static INTERNIMAGE_INLINE void store(Fp16* to, F v) {
    const U bits = (U)v, magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    // a normal half: the exponent 112 lower, the fraction rounded to nearest even
    const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // a subnormal half: the sum with 0.5 leaves multiples of 2^-24 in the lowest bits, rounded by the processor
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000;
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? (U{} + 0x7c00) : half;  // 65520 and more round to infinity
    half = magnitude > 0x7f800000 ? (U{} + 0x7e00) : half;
    INTERNIMAGE_ISA::store(to, __builtin_convertvector(half | sign, Vector<uint16_t, N>));
  }
};

// `n` numbers, one by one at the end.
template <typename S, typename T>
INTERNIMAGE_INLINE void copy_in(T* to, const S* from, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store(to + i, Convert<S, T, N>::load(from + i));
  for (; i < n; ++i) store(to + i, Convert<S, T, 1>::load(from + i));
}

template <typename S, typename T>
INTERNIMAGE_INLINE void copy_out(S* to, const T* from, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= n; i += N) Convert<S, T, N>::store(to + i, load<Vector<T, N>>(from + i));
  for (; i < n; ++i) Convert<S, T, 1>::store(to + i, load<Vector<T, 1>>(from + i));
}

// ---- shuffles

// The N lanes of a and b (0 to 2N - 1) that `lane(i)` names. Everything folds to constants.
template <typename V, int N, typename Lane>
INTERNIMAGE_INLINE V shuffle(V a, V b, Lane lane) {
#if defined(__clang__)
  V result;
  for (int i = 0; i < N; ++i) result[i] = lane(i) < N ? a[lane(i)] : b[lane(i) - N];
  return result;
#else
  typedef decltype(a < b) I;  // a vector of integers of the same width
  I lanes{};
  for (int i = 0; i < N; ++i) lanes[i] = lane(i);
  return __builtin_shuffle(a, b, lanes);
#endif
}

// 2 values a lane in memory -> two planar vectors.
template <typename T, int N>
INTERNIMAGE_INLINE void load_pairs(const T* from, Vector<T, N>& a, Vector<T, N>& b) {
  using V = Vector<T, N>;
  const V first = load<V>(from), second = load<V>(from + N);
  a = shuffle<V, N>(first, second, [](int i) { return 2 * i; });
  b = shuffle<V, N>(first, second, [](int i) { return 2 * i + 1; });
}

// The inverse of `load_pairs`.
template <typename T, int N>
INTERNIMAGE_INLINE void store_pairs(T* to, Vector<T, N> a, Vector<T, N> b) {
  using V = Vector<T, N>;
  store(to, shuffle<V, N>(a, b, [](int i) { return i / 2 + i % 2 * N; }));
  store(to + N, shuffle<V, N>(a, b, [](int i) { return N / 2 + i / 2 + i % 2 * N; }));
}

// 4 values a lane in memory -> four planar vectors.
template <typename T, int N>
INTERNIMAGE_INLINE void load_fours(const T* from, Vector<T, N>& a, Vector<T, N>& b, Vector<T, N>& c, Vector<T, N>& d) {
  using V = Vector<T, N>;
  V ac0, ac1, bd0, bd1;
  load_pairs<T, N>(from, ac0, bd0);
  load_pairs<T, N>(from + 2 * N, ac1, bd1);
  const auto even = [](int i) { return 2 * i; };
  const auto odd = [](int i) { return 2 * i + 1; };
  a = shuffle<V, N>(ac0, ac1, even);
  c = shuffle<V, N>(ac0, ac1, odd);
  b = shuffle<V, N>(bd0, bd1, even);
  d = shuffle<V, N>(bd0, bd1, odd);
}

template <int I>
struct Constant {
  static constexpr int value = I;
};

// Four vectors -> to[0..3], each summed over its lanes. One order of the lanes for every caller.
template <typename T, int N>
INTERNIMAGE_INLINE void sum4(T* to, Vector<T, N> v0, Vector<T, N> v1, Vector<T, N> v2, Vector<T, N> v3) {
  using V = Vector<T, N>;
  if constexpr (N < 4) {
    const V all[4] = {v0, v1, v2, v3};
    for (int j = 0; j < 4; ++j) {
      to[j] = all[j][0];
      for (int i = 1; i < N; ++i) to[j] += all[j][i];
    }
  } else {
    constexpr int H = N / 2, Q = N / 4;
    const auto first = [](int i) { return i % H + i / H * N; };  // the first halves of both vectors
    const auto second = [](int i) { return H + i % H + i / H * N; };
    const V s01 = shuffle<V, N>(v0, v1, first) + shuffle<V, N>(v0, v1, second);
    const V s23 = shuffle<V, N>(v2, v3, first) + shuffle<V, N>(v2, v3, second);
    const auto first_q = [](int i) { return i % Q + i / Q * H; };  // the first halves of all four halves
    const auto second_q = [](int i) { return Q + i % Q + i / Q * H; };
    V s = shuffle<V, N>(s01, s23, first_q) + shuffle<V, N>(s01, s23, second_q);
    if constexpr (Q >= 4) s += shuffle<V, N>(s, s, [](int i) { return i ^ 2; });
    if constexpr (Q >= 2) {
      s += shuffle<V, N>(s, s, [](int i) { return i ^ 1; });
      s = shuffle<V, N>(s, s, [](int i) { return i < 4 ? i * (N / 4) : i; });
    }
    static_assert(Q <= 4, "one more step for wider vectors");
    __builtin_memcpy(to, &s, 4 * sizeof(T));
  }
}

// N vectors -> one, whose lane i is the sum over the lanes of v[i]; overwrites v.
template <typename T, int N>
INTERNIMAGE_INLINE Vector<T, N> sum_all(Vector<T, N>* v) {
  using V = Vector<T, N>;
  // Step H joins pairs: a lane whose bit H is set goes on for the second vector, the others for the first.
  const auto join = [&](auto half) __attribute__((always_inline)) {
    constexpr int H = decltype(half)::value;
    for (int j = 0; j < H; ++j)
      v[j] = shuffle<V, N>(v[j], v[j + H], [](int i) { return i & H ? i + N : i; }) +
             shuffle<V, N>(v[j], v[j + H], [](int i) { return i & H ? (i ^ H) + N : i ^ H; });
  };
  if constexpr (N >= 16) join(Constant<8>{});
  if constexpr (N >= 8) join(Constant<4>{});
  if constexpr (N >= 4) join(Constant<2>{});
  if constexpr (N >= 2) join(Constant<1>{});
  return v[0];
}

// ---- exponential

// Several vectors at once, here and elsewhere, where each alone is one long chain of operations that wait for each other.

// x[...] <- exp(x[...]), in float to about one unit in the last place (Cephes' polynomial). NaN stays NaN. Asks for
// x <= 88; below -87 the result is 0.
template <int N, int K>
INTERNIMAGE_INLINE void exponential(Vector<float, N> (&x)[K]) {
  using F = Vector<float, N>;
  using I = Vector<int32_t, N>;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it has no room for a fraction
  constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F r[K], e[K];
  I n[K];
  for (int k = 0; k < K; ++k) {
    const F y = x[k] > -87.0f ? x[k] : F{} - 87.0f;  // also for NaN
    const F shifted = y * 1.44269504088896341f + kRound;
    n[k] = (I)shifted - (I)(F{} + kRound);
    const F whole = shifted - kRound;
    r[k] = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    e[k] = broadcast<float, N>(kCoefficients[0]);
  }
  for (int i = 1; i < 6; ++i)
    for (int k = 0; k < K; ++k) e[k] = e[k] * r[k] + kCoefficients[i];
  for (int k = 0; k < K; ++k) {
    e[k] = e[k] * (r[k] * r[k]) + r[k] + 1.0f;
    e[k] *= (F)((n[k] + 127) << 23);
    x[k] = x[k] < -87.0f ? F{} : e[k] + (x[k] - x[k]);  // the difference is 0, or NaN
  }
}

template <int N, int K>
INTERNIMAGE_INLINE void exponential(Vector<double, N> (&x)[K]) {
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < N; ++i) x[k][i] = __builtin_exp(x[k][i]);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
