// SPDX-License-Identifier: MIT
// The regular grid: the points of a kernel without offsets.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "points.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Fills in the grid of the strip at the image's upper left corner. That of any other strip is shifted by whole pixels.
template <typename T>
INTERNIMAGE_NOINLINE void fill_grid(const Problem& p, const StripShape& shape, const Points<T>& s,
                                    int64_t group_count) {
  const int64_t middle_x = p.dilation_w * (p.kernel_w - 1) / 2, middle_y = p.dilation_h * (p.kernel_h - 1) / 2;
  const int64_t outer_points = p.row_major ? p.kernel_h : p.kernel_w;
  const int64_t inner_points = p.row_major ? p.kernel_w : p.kernel_h;
  int64_t t = 0;
  for (int64_t pixel = 0; pixel < shape.rows * shape.columns; ++pixel) {
    const T center_x = (T)(pixel % shape.columns * p.stride_w - p.pad_w + middle_x);
    const T center_y = (T)(pixel / shape.columns * p.stride_h - p.pad_h + middle_y);
    for (int64_t g = 0; g < group_count; ++g) {
      for (int64_t outer = 0; outer < outer_points; ++outer) {
        for (int64_t inner = 0; inner < inner_points; ++inner) {
          const int64_t i = p.row_major ? inner : outer, j = p.row_major ? outer : inner;
          if (p.remove_center && i == p.kernel_w / 2 && j == p.kernel_h / 2) continue;
          s.center_x[t] = center_x;
          s.center_y[t] = center_y;
          s.kernel_x[t] = (T)(i * p.dilation_w - middle_x);
          s.kernel_y[t] = (T)(j * p.dilation_h - middle_y);
          ++t;
        }
      }
    }
  }
  for (const int64_t end = t + kLanes<T>; t < end; ++t)  // finite values for the rest of the last vector
    s.center_x[t] = s.center_y[t] = s.kernel_x[t] = s.kernel_y[t] = 0;
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
