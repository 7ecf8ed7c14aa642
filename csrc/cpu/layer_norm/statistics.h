// SPDX-License-Identifier: MIT
// Mean and variance of rows.
#pragma once

#include <cstdint>

#include "../simd/shuffle.h"
#include "../simd/target.h"
#include "../simd/vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Sums four rows of n elements; each(row, index, Constant<lanes>) returns a vector of so many elements.
template <typename T, typename Each>
INTERNIMAGE_INLINE void sum_rows(T* sums, int64_t n, Each each) {
  constexpr int N = kLanes<T>;
  Vector<T, N> part[4] = {};
  T rest[4] = {};
  int64_t c = 0;
  for (; c + N <= n; c += N)
    for (int r = 0; r < 4; ++r) part[r] += each(r, c, Constant<N>{});
  for (; c < n; ++c)
    for (int r = 0; r < 4; ++r) rest[r] += each(r, c, Constant<1>{})[0];
  sum_lanes_4<T, N>(sums, part[0], part[1], part[2], part[3]);
  for (int r = 0; r < 4; ++r) sums[r] += rest[r];
}

// The mean of four rows, and 1 / sqrt(variance + eps): `first` returns their elements for the mean, `value` once more
// for the variance, as `each` of `sum_rows`.
template <typename T, typename First, typename Value>
INTERNIMAGE_INLINE void normalization(T (&mean)[4], T (&factor)[4], int64_t channels, T eps, First first, Value value) {
  sum_rows<T>(mean, channels, first);
  for (int r = 0; r < 4; ++r) mean[r] /= (T)channels;
  sum_rows<T>(factor, channels, [&](int r, int64_t c, auto lanes) __attribute__((always_inline)) {
    const auto deviation = value(r, c, lanes) - mean[r];
    return uncontracted<T, decltype(lanes)::value>(deviation * deviation);
  });
  for (int r = 0; r < 4; ++r) factor[r] = (T)1 / (T)__builtin_sqrt(factor[r] / (T)channels + eps);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
