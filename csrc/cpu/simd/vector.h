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

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
