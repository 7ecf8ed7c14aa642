// SPDX-License-Identifier: MIT
// Loads the offsets and the mask of a strip from the tensors into its arrays.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "points.h"
#include "softmax.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Copies `count` elements of each of the strip's pixels, which are `stride` apart, densely, and appends zeros.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void read_strip(T* to, const S* from, int64_t pixels, int64_t count, int64_t stride) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  if (count == stride) {
    copy_widened(to, from, pixels * count);
  } else {
    // Whole vectors: what is written past a pixel's elements is overwritten by the next pixel's, and nothing is read
    // past the beginning of those.
    const int64_t rounded = (count + N - 1) / N * N;
    for (int64_t i = 0; i < pixels; ++i, from += stride, to += count) {
      if (rounded <= stride && i + 1 < pixels) {
        for (int64_t k = 0; k < count; k += N) store(to + k, Convert<S, T, N>::load(from + k));
      } else {
        copy_widened(to, from, count);
      }
    }
    to -= pixels * count;
  }
  // for the rest of the last vector of points, which have up to two elements each
  store(to + pixels * count, V{});
  store(to + pixels * count + N, V{});
}

// As above for `count` elements of each of a pixel's groups.
template <typename S, typename T>
INTERNIMAGE_INLINE void read_units(T* to, const S* from, int64_t pixels, int64_t groups, int64_t count,
                                   UnitStrides stride) {
  if (stride.group == count || groups == 1) {
    read_strip(to, from, pixels, groups * count, stride.pixel);
  } else {
    for (int64_t i = 0; i < pixels; ++i)
      read_strip(to + i * groups * count, from + i * stride.pixel, groups, count, stride.group);
  }
}

// Loads the offsets and the mask of `group_count` groups from first_group on; computes the softmax if there is one.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void load_points(const Problem& p, const Strip& strip, const Points<T>& s, const S* offset,
                                      const S* mask, int64_t first_group, int64_t group_count) {
  const auto at = [&](UnitStrides stride) { return strip.first_pixel * stride.pixel + first_group * stride.group; };
  read_units(s.offset, offset + at(p.offset), strip.pixels, group_count, 2 * p.points, p.offset);
  read_units(p.softmax ? s.logits : s.factor, mask + at(p.mask), strip.pixels, group_count, p.points, p.mask);
  if (p.softmax) softmax(s, strip.pixels * group_count, p.points);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
