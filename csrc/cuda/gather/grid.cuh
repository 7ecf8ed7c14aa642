// SPDX-License-Identifier: MIT
// The regular grid: the points of a kernel without offsets. Their order is x-major, as in DCNv3.
#pragma once

#include "arguments.h"

namespace internimage {
namespace cuda {

// Calls body(k, grid_x, grid_y) for the points of the kernel, x-major. kPoints: 9 and 8 are the 3x3 kernel with and
// without its center, unrolled; 0 is any kernel.
template <int kPoints, typename T, typename Index, typename Body>
__device__ __forceinline__ void for_each_point(const Arguments<T, Index>& a, Body body) {
  if constexpr (kPoints > 0) {
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      const int cell = kPoints == 8 && k >= 4 ? k + 1 : k;
      body(k, a.grid_x[cell / 3], a.grid_y[cell % 3]);
    }
  } else {
    int k = 0;
    for (int column = 0; column < a.kernel_w; ++column) {
      const T grid_x = static_cast<T>(column * a.dilation_w - a.center_w);
      for (int row = 0; row < a.kernel_h; ++row) {
        if (a.remove_center && column == a.kernel_w / 2 && row == a.kernel_h / 2) continue;
        body(k++, grid_x, static_cast<T>(row * a.dilation_h - a.center_h));
      }
    }
  }
}

}  // namespace cuda
}  // namespace internimage
