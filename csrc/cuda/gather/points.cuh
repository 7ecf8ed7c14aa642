// SPDX-License-Identifier: MIT
// The pixels around each of a unit's sampling points.
//
// Corners outside the image are read from a row of zeros: no branch, and no infinity that a weight of zero would turn
// into NaN.
#pragma once

#include <cstdint>

#include "../storage.cuh"
#include "arguments.h"
#include "units.cuh"

namespace internimage {
namespace cuda {

constexpr int kZeroBytes = 32;  // at least what a thread loads from a pixel

struct alignas(kZeroBytes) Zeros {
  uint4 words[kZeroBytes / 16];
};
__device__ Zeros zero_row;  // never written to

// The four pixels around a location. Corners are numbered upper left, upper right, lower left, lower right.
template <typename T, typename Index>
struct Cell {
  bool inside, has_column[2], has_row[2];
  T right, below;  // bilinear shares of the right and the lower pixels
  int32_t column, row;  // of the upper left pixel
  Index upper_left, step_x, step_y;  // elements, within an image

  Cell() = default;
  __device__ __forceinline__ Cell(const Arguments<T, Index>& a, T x, T y) : step_x(a.channels), step_y(a.row_elements) {
    inside = x > -1 && x < a.right_end && y > -1 && y < a.lower_end;  // false for NaN
    x = inside ? x : T(0);
    y = inside ? y : T(0);
    const T x_floor = floor(x), y_floor = floor(y);
    right = x - x_floor;
    below = y - y_floor;
    has_column[0] = inside && x >= 0;
    has_column[1] = inside && x_floor < a.last_column;
    has_row[0] = y >= 0;
    has_row[1] = y_floor < a.last_row;
    column = static_cast<int32_t>(x_floor);
    row = static_cast<int32_t>(y_floor);
    // wraps around to the left of the image and above it, where it is not used
    upper_left = (static_cast<Index>(row) * a.width + static_cast<Index>(column)) * a.channels;
  }
  __device__ __forceinline__ bool has(int corner) const { return has_column[corner % 2] && has_row[corner / 2]; }
  __device__ __forceinline__ Index at(int corner) const {
    return upper_left + (corner % 2 ? step_x : 0) + (corner / 2 ? step_y : 0);
  }
  __device__ __forceinline__ T weight(int corner) const {
    return (corner % 2 ? right : 1 - right) * (corner / 2 ? below : 1 - below);
  }
  // Loads N channels of a corner; `image` is the first of them.
  template <typename S, int N>
  __device__ __forceinline__ void read(int corner, const S* image, T (&values)[N]) const {
    load<S, N>(has(corner) ? image + at(corner) : reinterpret_cast<const S*>(&zero_row), values);
  }
};

// The location of point k: the same operations in the same order as the reference's.
template <typename S, int kLayout = kDense, typename T, typename Index>
__device__ __forceinline__ Cell<T, Index> locate(const Arguments<T, Index>& a, const Unit<T, Index>& unit,
                                                 const S* offset, int k, T grid_x, T grid_y) {
  T shift[2];
  load_shift<kLayout>(a, offset + 2 * k, shift);
  return Cell<T, Index>(a, unit.x + (grid_x + shift[0]) * a.offset_scale,
                        unit.y + (grid_y + shift[1]) * a.offset_scale);
}

}  // namespace cuda
}  // namespace internimage
