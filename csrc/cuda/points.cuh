// SPDX-License-Identifier: MIT
// Sampling points: where a thread is, where its points are, their factors and the pixels around them.
//
// A corner outside the image is read from a row of zeros: no branch, and no infinity that a weight of zero would turn
// into NaN.
#pragma once

#include <cstdint>

#include "arguments.cuh"
#include "storage.cuh"

namespace internimage {
namespace cuda {

// Calls body(k, grid_x, grid_y) for the points of the kernel, x-major. kPoints: 9 and 8 are the 3x3 kernel with and
// without its centre, unrolled; 0 is any kernel.
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
      const T grid_x = static_cast<T>(column * a.dilation_w - a.centre_w);
      for (int line = 0; line < a.kernel_h; ++line) {
        if (a.remove_center && column == a.kernel_w / 2 && line == a.kernel_h / 2) continue;
        body(k++, grid_x, static_cast<T>(line * a.dilation_h - a.centre_h));
      }
    }
  }
}

// The factors of a unit's points: its mask, or the softmax of it.
template <typename S, int kPoints>
struct Factors {
  using T = Compute<S>;
  T values[kPoints];

  __device__ __forceinline__ Factors(const S* mask, int, bool softmax) {
#pragma unroll
    for (int k = 0; k < kPoints; ++k) values[k] = Storage<S>::widen(__ldg(mask + k));
    if (!softmax) return;
    T largest = values[0];
#pragma unroll
    for (int k = 1; k < kPoints; ++k) largest = values[k] > largest ? values[k] : largest;
    T sum = 0;
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      values[k] = exponential(values[k] - largest);
      sum += values[k];
    }
    const T scale = inverse(sum);
#pragma unroll
    for (int k = 0; k < kPoints; ++k) values[k] *= scale;
  }
  __device__ __forceinline__ T at(int k) const { return values[k]; }
};

template <typename S>
struct Factors<S, 0> {  // of any number: computed again each time
  using T = Compute<S>;
  const S* mask;
  T largest, scale;
  bool softmax;

  __device__ __forceinline__ Factors(const S* mask_, int points, bool softmax_)
      : mask(mask_), largest(0), scale(1), softmax(softmax_) {
    if (!softmax) return;
    largest = Storage<S>::widen(__ldg(mask));
    for (int k = 1; k < points; ++k) {
      const T value = Storage<S>::widen(__ldg(mask + k));
      largest = value > largest ? value : largest;
    }
    T sum = 0;
    for (int k = 0; k < points; ++k) sum += exponential(Storage<S>::widen(__ldg(mask + k)) - largest);
    scale = inverse(sum);
  }
  __device__ __forceinline__ T at(int k) const {
    const T value = Storage<S>::widen(__ldg(mask + k));
    return softmax ? exponential(value - largest) * scale : value;
  }
};

// Where a unit is.
template <typename T, typename Index>
struct Unit {
  Index group, image;
  T x, y;  // the kernel's centre

  __device__ __forceinline__ Unit(const Arguments<T, Index>& a, Index unit) {
    const Index pixel = a.groups.quotient(unit);
    group = unit - pixel * a.groups.divisor;
    const Index line = a.out_width.quotient(pixel);
    x = static_cast<T>(static_cast<int32_t>(pixel - line * a.out_width.divisor) * a.stride_w + a.first_x);
    image = a.out_height.quotient(line);
    y = static_cast<T>(static_cast<int32_t>(line - image * a.out_height.divisor) * a.stride_h + a.first_y);
  }
};

constexpr int kZeroBytes = 32;  // more than any thread loads of a pixel at once

struct alignas(kZeroBytes) Zeros {
  uint4 words[kZeroBytes / 16];
};
__device__ Zeros zero_row;  // nothing ever writes here

// The four pixels around a location. Corners are counted upper left, upper right, lower left, lower right.
template <typename T, typename Index>
struct Cell {
  bool inside, has_column[2], has_line[2];
  T right, below;  // shares of the right and of the lower pixels
  Index place, step_x, step_y;

  __device__ __forceinline__ Cell(const Arguments<T, Index>& a, T x, T y) : step_x(a.channels), step_y(a.row) {
    inside = x > -1 && x < a.right_end && y > -1 && y < a.lower_end;  // false for NaN
    x = inside ? x : T(0);
    y = inside ? y : T(0);
    const T x_floor = floor(x), y_floor = floor(y);
    right = x - x_floor;
    below = y - y_floor;
    has_column[0] = inside && x >= 0;
    has_column[1] = inside && x_floor < a.last_column;
    has_line[0] = y >= 0;
    has_line[1] = y_floor < a.last_row;
    // wraps around left of and above the image, where it is not used
    place = (static_cast<Index>(static_cast<int32_t>(y_floor)) * a.width +
             static_cast<Index>(static_cast<int32_t>(x_floor))) * a.channels;
  }
  __device__ __forceinline__ bool has(int corner) const { return has_column[corner % 2] && has_line[corner / 2]; }
  __device__ __forceinline__ Index at(int corner) const {
    return place + (corner % 2 ? step_x : 0) + (corner / 2 ? step_y : 0);
  }
  __device__ __forceinline__ T weight(int corner) const {
    return (corner % 2 ? right : 1 - right) * (corner / 2 ? below : 1 - below);
  }
  // A corner's values, of channels that begin at `image`.
  template <typename S, int N>
  __device__ __forceinline__ void read(int corner, const S* image, T (&values)[N]) const {
    load<S, N>(has(corner) ? image + at(corner) : reinterpret_cast<const S*>(&zero_row), values);
  }
};

// The location of point k: the same operations in the same order as the reference's.
template <typename S, typename T, typename Index>
__device__ __forceinline__ Cell<T, Index> locate(const Arguments<T, Index>& a, const Unit<T, Index>& unit,
                                                 const S* offset, int k, T grid_x, T grid_y) {
  T shift[2];
  load<S, 2>(offset + 2 * k, shift);
  return Cell<T, Index>(a, unit.x + (grid_x + shift[0]) * a.offset_scale, unit.y + (grid_y + shift[1]) * a.offset_scale);
}

}  // namespace cuda
}  // namespace internimage
