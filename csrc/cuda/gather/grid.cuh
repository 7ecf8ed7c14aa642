// SPDX-License-Identifier: MIT
// The regular grid: the points of a kernel without offsets.
#pragma once

#include "arguments.h"

namespace internimage {
namespace cuda {

// Calls body(k, grid_x, grid_y) for the points of the kernel: column by column, as in DCNv3, or in the order of a
// layout that is not dense. kPoints: 9 and 8 are the 3x3 kernel with and without its center, unrolled; 0 is any kernel.
template <int kPoints, int kLayout = kDense, typename T, typename Index, typename Body>
__device__ __forceinline__ void for_each_point(const Arguments<T, Index>& a, Body body) {
  const bool row_major = kLayout != kDense && a.row_major;
  if constexpr (kPoints > 0) {
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      const int cell = kPoints == 8 && k >= 4 ? k + 1 : k;
      body(k, a.grid_x[row_major ? cell % 3 : cell / 3], a.grid_y[row_major ? cell / 3 : cell % 3]);
    }
  } else {
    const int lines = row_major ? a.kernel_h : a.kernel_w, places = row_major ? a.kernel_w : a.kernel_h;
    int k = 0;
    for (int line = 0; line < lines; ++line) {
      for (int place = 0; place < places; ++place) {
        const int column = row_major ? place : line, row = row_major ? line : place;
        if (a.remove_center && column == a.kernel_w / 2 && row == a.kernel_h / 2) continue;
        body(k++, static_cast<T>(column * a.dilation_w - a.center_w), static_cast<T>(row * a.dilation_h - a.center_h));
      }
    }
  }
}

}  // namespace cuda
}  // namespace internimage
