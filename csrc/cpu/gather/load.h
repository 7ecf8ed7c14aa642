// SPDX-License-Identifier: MIT
// Offsets and mask of a strip, from the tensors into the strip's arrays.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/storage.h"
#include "../simd/vector.h"
#include "points.h"
#include "softmax.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// `count` numbers of each of the strip's pixels, of `stride` there are, one after the other, and zeros behind them.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void read_strip(T* to, const S* from, int64_t pixels, int64_t count, int64_t stride) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  if (count == stride) {
    copy_in(to, from, pixels * count);
  } else {
    // whole vectors: what is written past a pixel's numbers the next pixel's overwrite, and no more is read than what
    // the next pixel has
    const int64_t rounded = (count + N - 1) / N * N;
    for (int64_t i = 0; i < pixels; ++i, from += stride, to += count) {
      if (rounded <= stride && i + 1 < pixels) {
        for (int64_t k = 0; k < count; k += N) store(to + k, Convert<S, T, N>::load(from + k));
      } else {
        copy_in(to, from, count);
      }
    }
    to -= pixels * count;
  }
  // for the rest of the last vector of points, which has up to two numbers a point
  store(to + pixels * count, V{});
  store(to + pixels * count + N, V{});
}

// Offsets and mask of a strip and `count` groups from g0.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void load_points(const Problem& p, const StripPlace& place, const Points<T>& s, const S* offset,
                                      const S* mask, int64_t g0, int64_t count) {
  const int64_t all = p.groups * p.points, from = place.first * all + g0 * p.points;
  read_strip(s.offset, offset + 2 * from, place.pixels, 2 * count * p.points, 2 * all);
  read_strip(p.softmax ? s.logits : s.factor, mask + from, place.pixels, count * p.points, all);
  if (p.softmax) softmax(s, place.pixels * count, p.points);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
