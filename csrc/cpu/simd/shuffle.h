// SPDX-License-Identifier: MIT
// Shuffles: interleaved pairs in memory to planar vectors and back, sums over lanes.
#pragma once

#include "target.h"
#include "vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// The numbers 0 to N - 1 as a pack. Not of the C++ library: isa/build.h.
template <int... I>
struct Numbers {};
template <int N, int... I>
struct NumbersBelow : NumbersBelow<N - 1, N - 1, I...> {};
template <int... I>
struct NumbersBelow<0, I...> {
  using type = Numbers<I...>;
};

template <typename V, typename Lane, int... I>
INTERNIMAGE_INLINE V shuffle_numbered(V a, V b, Lane lane, Numbers<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, lane(I)...);
#else  // GCC 11 and older: of Ubuntu 22.04 and RHEL 9
  typedef decltype(a < b) Integers;  // as wide as the elements
  return __builtin_shuffle(a, b, Integers{lane(I)...});
#endif
}

// Lane i of the result is lane `lane(i)` of a and b, counted from 0 to 2N - 1. `lane` captures nothing, so that every
// lane is a constant: a loop over elements would be compiled to as many scalar moves by Clang.
template <typename V, int N, typename Lane>
INTERNIMAGE_INLINE V shuffle(V a, V b, Lane lane) {
  return shuffle_numbered(a, b, lane, typename NumbersBelow<N>::type{});
}

// 2 values per lane in memory -> two planar vectors.
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

// 4 values per lane in memory -> four planar vectors.
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

// Calls each(Constant<i>{}) for i from 0 to N - 1.
template <int N, typename Each>
INTERNIMAGE_INLINE void for_numbers(Each each) {
  if constexpr (N > 0) {
    for_numbers<N - 1>(each);
    each(Constant<N - 1>{});
  }
}

// Four vectors -> to[0..3], each summed over its lanes, in the same order for every caller.
template <typename T, int N>
INTERNIMAGE_INLINE void sum_lanes_4(T* to, Vector<T, N> v0, Vector<T, N> v1, Vector<T, N> v2, Vector<T, N> v3) {
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
INTERNIMAGE_INLINE Vector<T, N> sum_lanes_n(Vector<T, N>* v) {
  using V = Vector<T, N>;
  // Step H joins pairs: lanes whose bit H is set continue the second vector's sum, the others the first's.
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

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
