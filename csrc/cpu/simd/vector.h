// SPDX-License-Identifier: MIT
// SIMD vectors by the vector extensions of GCC and Clang instead of intrinsics, so that the same source serves every
// processor.
#pragma once

#include <cstdint>

#include "target.h"

#define INTERNIMAGE_INLINE inline __attribute__((always_inline))
#define INTERNIMAGE_NOINLINE __attribute__((noinline))  // runs once per strip: one copy serves all callers

namespace internimage {
namespace INTERNIMAGE_ISA {

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

// v, opaque to the compiler, which does not contract a product and the sum that follows into a fused multiply-add: both
// are rounded. It contracts one instance of a function and not another, where results have to have the same bits.
template <typename T, int N>
INTERNIMAGE_INLINE Vector<T, N> uncontracted(Vector<T, N> v) {
  if constexpr (N == 1) {
    T scalar = v[0];
#if defined(__x86_64__)
    __asm__("" : "+x"(scalar));
#else
    __asm__("" : "+m"(scalar));
#endif
    v[0] = scalar;
  } else {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__x86_64__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#else
    __asm__("" : "+m"(v));
#endif
  }
  return v;
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
