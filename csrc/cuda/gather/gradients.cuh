// SPDX-License-Identifier: MIT
// What the backward kernels share: sums over the lanes of a unit, and the gradients of a point.
#pragma once

#include <cstdint>

#include "../storage.cuh"
#include "arguments.h"
#include "points.cuh"

namespace internimage {
namespace cuda {

// Sums each of N values over the threads of a unit; all of these get the sums. All threads of the warp must call it.
// kLanes: how many these are; 0 if that is known at launch alone.
template <int kLanes, int N, typename T, typename Index>
__device__ __forceinline__ void sum_over_lanes(const Arguments<T, Index>& a, T (&values)[N]) {
  if constexpr (kLanes > 0) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
    }
  } else {
#pragma unroll 1
    for (uint32_t distance = a.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
    }
  }
}

template <typename T, typename Index>
__device__ __forceinline__ T interpolate(const Cell<T, Index>& cell, const T (&dots)[4]) {
  return (1 - cell.below) * ((1 - cell.right) * dots[0] + cell.right * dots[1]) +
         cell.below * ((1 - cell.right) * dots[2] + cell.right * dots[3]);
}

// From <grad_output, corner> for the corners of a point: the derivatives of <grad_output, sample> along x and y, and
// that product itself, which is the gradient of the factor.
template <typename T, typename Index>
__device__ __forceinline__ void differentiate(const Cell<T, Index>& cell, const T (&dots)[4], T (&sums)[3]) {
  sums[0] = (1 - cell.below) * (dots[1] - dots[0]) + cell.below * (dots[3] - dots[2]);
  sums[1] = (1 - cell.right) * (dots[2] - dots[0]) + cell.right * (dots[3] - dots[1]);
  sums[2] = interpolate(cell, dots);
}

// The gradient of a point's offset: that of its location, whose derivatives are sums[0] and sums[1].
template <typename T, typename Index>
__device__ __forceinline__ void shift_gradient(const Arguments<T, Index>& a, const Cell<T, Index>& cell, T factor,
                                               const T (&sums)[3], T (&shift)[2]) {
  const T scale = factor * a.offset_scale;
#pragma unroll
  for (int i = 0; i < 2; ++i) shift[i] = cell.inside ? sums[i] * scale : T(0);
}

// The gradient of a mask from that of its factor; `mean` is the sum of factor * its gradient over the unit.
template <typename T>
__device__ __forceinline__ T mask_gradient(bool softmax, T factor, T grad_factor, T mean) {
  return softmax ? factor * (grad_factor - mean) : grad_factor;
}

// Adds a point's part of the gradient to its corners: to kParts times N channels, which are `step` apart. `grad_image`
// is the gradient of the first.
template <int kParts, int N, typename T, typename Index>
__device__ __forceinline__ void add_to_corners(const Cell<T, Index>& cell, T factor, const T (&grad)[kParts][N],
                                               T* grad_image, uint32_t step) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (!cell.has(corner)) continue;
    const T weight = factor * cell.weight(corner);
    T* to = grad_image + cell.at(corner);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      T values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = weight * grad[part][i];
      atomic_add<T, N>(to + part * step, values);
    }
  }
}

}  // namespace cuda
}  // namespace internimage
