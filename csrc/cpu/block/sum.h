// SPDX-License-Identifier: MIT
// The sum that ends a branch of a residual block.
#pragma once

#include <cstdint>

#include "../simd/shuffle.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// output = x + y * scale for rows [begin, end) of `channels` elements; scale may be null, and the output may be x or y.
// In float32 and float64 product and sum are rounded as in separate operators.
template <typename S, typename T>
void scaled_sum(const void* x, const void* y, const void* scale, void* output, int64_t channels, int64_t begin,
                int64_t end) {
  const auto add = [&](int64_t at, int64_t c, auto lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value;
    using C = Convert<S, T, N>;
    Vector<T, N> v = C::load((const S*)y + at);
    if (scale != nullptr) v = uncontracted<T, N>(v * C::load((const S*)scale + c));
    C::store((S*)output + at, C::load((const S*)x + at) + v);
  };
  constexpr int N = kLanes<T>;
  // without a scale, all rows are one
  const int64_t width = scale == nullptr ? (end - begin) * channels : channels;
  for (int64_t at = begin * channels; at < end * channels; at += width) {
    int64_t c = 0;
    for (; c + N <= width; c += N) add(at + c, c, Constant<N>{});
    for (; c < width; ++c) add(at + c, c, Constant<1>{});
  }
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
