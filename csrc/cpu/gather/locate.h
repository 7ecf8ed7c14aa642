// SPDX-License-Identifier: MIT
// The location of each point, and the weights of its corners.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/shuffle.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "points.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// floor(x), also as an integer, which |x| must fit.
template <typename T, int N>
INTERNIMAGE_INLINE void floor_and_integer(Vector<T, N> x, Vector<T, N>& floor,
                                          Vector<typename IntOf<T>::type, N>& integer) {
  using V = Vector<T, N>;
  using I = Vector<typename IntOf<T>::type, N>;
  integer = __builtin_convertvector(x, I);
  floor = __builtin_convertvector(integer, V);
  const I above = floor > x;  // -1 where truncation rounded up
  integer += above;
  floor -= above ? V{} + 1 : V{};
}

// Computes the location of each of the strip's points and the weights of its corners; returns the rows that they
// sample. A point outside the image has weight 0 and samples the corner of the padding.
template <typename T, bool kBackward, bool kYFirst>
INTERNIMAGE_NOINLINE RowRange locate_ordered(const Problem& p, const Strip& strip, const Points<T>& s, int64_t total,
                                             int64_t pitch) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  using Int = typename IntOf<T>::type;
  using I = Vector<Int, N>;
  const T scale = (T)p.offset_scale;
  const T shift_x = (T)(strip.x * p.stride_w), shift_y = (T)(strip.y * p.stride_h);
  const V width = broadcast<T, N>((T)p.width), height = broadcast<T, N>((T)p.height);
  const V zero = V{}, one = zero + 1;
  // used as the row of a point outside, which must not widen the range of rows
  int64_t middle = strip.y * p.stride_h - p.pad_h + p.dilation_h * (p.kernel_h - 1) / 2;
  middle = middle < 0 ? 0 : middle >= p.height ? p.height - 1 : middle;
  const V safe_y = broadcast<T, N>((T)middle);
  V lowest = safe_y, highest = safe_y;
  for (int64_t t = 0; t < total; t += N) {
    V first, second;
    load_pairs<T, N>(s.offset + 2 * t, first, second);
    const V dx = kYFirst ? second : first, dy = kYFirst ? first : second;
    V x = (load<V>(s.center_x + t) + shift_x) + (load<V>(s.kernel_x + t) + dx) * scale;
    V y = (load<V>(s.center_y + t) + shift_y) + (load<V>(s.kernel_y + t) + dy) * scale;
    const I inside = (x > (T)-1) & (x < width) & (y > (T)-1) & (y < height);  // false for NaN
    x = inside ? x : zero;
    y = inside ? y : safe_y;
    V floor_x, floor_y;
    I integer_x, integer_y;
    floor_and_integer<T, N>(x, floor_x, integer_x);
    floor_and_integer<T, N>(y, floor_y, integer_y);
    lowest = floor_y < lowest ? floor_y : lowest;
    highest = floor_y > highest ? floor_y : highest;
    const I pixel = (integer_y + 2) * (Int)pitch + (integer_x + 2);
    store(s.pixel + t, __builtin_convertvector(inside ? pixel : I{}, Vector<int32_t, N>));
    const V factor = inside ? load<V>(s.factor + t) : zero;
    const V right = x - floor_x, below = y - floor_y, left = one - right;
    const V upper = (one - below) * factor, lower = below * factor;
    store(s.weight[0] + t, left * upper);
    store(s.weight[1] + t, right * upper);
    store(s.weight[2] + t, left * lower);
    store(s.weight[3] + t, right * lower);
    if (kBackward) {
      store(s.right + t, right);
      store(s.below + t, below);
      store(s.inside_factor + t, factor);
    }
  }
  T low = lowest[0], high = highest[0];
  for (int i = 1; i < N; ++i) {
    low = lowest[i] < low ? lowest[i] : low;
    high = highest[i] > high ? highest[i] : high;
  }
  const int64_t begin = (int64_t)low, end = (int64_t)high + 2;
  return {begin < 0 ? 0 : begin, end > p.height ? p.height : end};
}

template <typename T, bool kBackward>
INTERNIMAGE_INLINE RowRange locate(const Problem& p, const Strip& strip, const Points<T>& s, int64_t total,
                                   int64_t pitch) {
  return p.y_first ? locate_ordered<T, kBackward, true>(p, strip, s, total, pitch)
                   : locate_ordered<T, kBackward, false>(p, strip, s, total, pitch);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
