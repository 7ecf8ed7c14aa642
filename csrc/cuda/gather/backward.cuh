// SPDX-License-Identifier: MIT
// Backward: a thread processes chunks of 4 channels, as atomic additions of floats are 4 wide; the threads of a unit
// (its lanes) are adjacent in a warp, and sum their parts of the gradients of offset and mask by shuffles.
#pragma once

#include <cstdint>

#include "../storage.cuh"
#include "../types.h"
#include "arguments.h"
#include "factors.cuh"
#include "grid.cuh"
#include "points.cuh"

namespace internimage {
namespace cuda {

// Sums each of N values over the threads of a unit; all of these get the sums. All threads of the warp must call it.
template <int N, typename T, typename Index>
__device__ __forceinline__ void sum_over_lanes(const Arguments<T, Index>& a, T (&values)[N]) {
#pragma unroll 1
  for (uint32_t distance = a.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
  }
}

// This thread's part of <grad, corner> for the four corners.
template <typename S, int kChannels, typename T, typename Index>
__device__ __forceinline__ void dot_corners(const Arguments<T, Index>& a, const Cell<T, Index>& cell, const S* image,
                                            const S* grad_output, uint32_t chunks, T (&grad)[kChannels], T (&dots)[4]) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) dots[corner] = 0;
#pragma unroll 1
  for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
    const uint32_t channel = chunk * a.lanes * kChannels;
    if (chunks > 1) load<S, kChannels>(grad_output + channel, grad);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      T values[kChannels];
      cell.template read<S, kChannels>(corner, image + channel, values);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) dots[corner] += grad[i] * values[i];
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
template <typename S, typename T, typename Index>
__device__ __forceinline__ void store_shift(const Arguments<T, Index>& a, const Cell<T, Index>& cell, T factor,
                                            const T (&sums)[3], S* grad_offset) {
  const T scale = factor * a.offset_scale;
  const T grad_shift[2] = {cell.inside ? sums[0] * scale : T(0), cell.inside ? sums[1] * scale : T(0)};
  store<S, 2>(grad_offset, grad_shift);
}

// The gradient of a mask from that of its factor; `mean` is the sum of factor * its gradient over the unit.
template <typename T>
__device__ __forceinline__ T mask_gradient(bool softmax, T factor, T grad_factor, T mean) {
  return softmax ? factor * (grad_factor - mean) : grad_factor;
}

// Adds a point's part of the gradient to its corners; `grad_image` is that of the first of N channels.
template <int N, typename T, typename Index>
__device__ __forceinline__ void add_to_corners(const Cell<T, Index>& cell, T factor, const T (&grad)[N],
                                               T* grad_image) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (!cell.has(corner)) continue;
    const T weight = factor * cell.weight(corner);
    T values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = weight * grad[i];
    atomic_add<T, N>(grad_image + cell.at(corner), values);
  }
}

// If kPoints > 0, each thread has all its channels at once (one chunk).
// grad_input is filled with zeros and of the compute type. It may be null, or both grad_offset and grad_mask.
template <typename S, int kChannels, int kPoints, typename Index>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                    const S* __restrict__ input, const S* __restrict__ offset, const S* __restrict__ mask,
                    Compute<S>* __restrict__ grad_input, S* __restrict__ grad_offset, S* __restrict__ grad_mask) {
  using T = Compute<S>;
  Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  // An excess thread takes part in the shuffles of its warp: it repeats the work of the last thread and writes nothing.
  const bool is_active = thread < a.threads;
  thread = is_active ? thread : a.threads - 1;
  const Index index = thread >> a.lane_bits;
  const uint32_t lane = static_cast<uint32_t>(thread) & (a.lanes - 1);
  const Unit<T, Index> unit(a, index);
  const uint32_t first = lane * kChannels;
  const uint64_t at = unit.image * a.image_elements + (unit.group * a.group_channels + first);
  const S* image = materialize(input + at);
  T* grad_image = materialize(grad_input + at);  // not used if null
  grad_output += static_cast<uint64_t>(index) * a.group_channels + first;
  T grad[kChannels];
  load<S, kChannels>(grad_output, grad);
  const int points = kPoints > 0 ? kPoints : a.points;
  const uint64_t first_point = static_cast<uint64_t>(index) * points;
  offset += 2 * first_point;
  const Factors<S, kPoints> factors(mask + first_point, points, a.softmax);
  const bool writes = is_active && lane == 0;
  const uint32_t chunks = kPoints > 0 ? 1 : a.chunks;
  const bool want_points = grad_offset != nullptr;

  T mean = 0;  // sum of factor * its gradient, for the softmax
  [[maybe_unused]] T grad_factors[kPoints > 0 ? kPoints : 1];
  if constexpr (kPoints == 0) {  // too many to keep: an extra pass for the mean alone
    if (want_points && a.softmax) {
      T sums[1] = {0};
      for_each_point<kPoints>(a, [&](int k, T grid_x, T grid_y) {
        const Cell<T, Index> cell = locate<S>(a, unit, offset, k, grid_x, grid_y);
        T dots[4];
        dot_corners<S, kChannels>(a, cell, image, grad_output, chunks, grad, dots);
        sums[0] += cell.inside ? factors.at(k) * interpolate(cell, dots) : T(0);
      });
      sum_over_lanes(a, sums);
      mean = sums[0];
    }
  }

  for_each_point<kPoints>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S>(a, unit, offset, k, grid_x, grid_y);
    const T factor = cell.inside ? factors.at(k) : T(0);
    if (want_points) {
      T dots[4];
      dot_corners<S, kChannels>(a, cell, image, grad_output, chunks, grad, dots);
      T sums[3];
      differentiate(cell, dots, sums);
      sum_over_lanes(a, sums);
      const T grad_factor = cell.inside ? sums[2] : T(0);
      if (writes) store_shift(a, cell, factor, sums, grad_offset + 2 * (first_point + k));
      if constexpr (kPoints > 0) {
        grad_factors[k] = grad_factor;
        mean += factors.at(k) * grad_factor;
      } else if (writes) {
        grad_mask[first_point + k] = Storage<S>::narrow(mask_gradient(a.softmax, factors.at(k), grad_factor, mean));
      }
    }
    if (grad_input != nullptr && is_active && cell.inside) {
#pragma unroll 1
      for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t channel = chunk * a.lanes * kChannels;
        if (chunks > 1) load<S, kChannels>(grad_output + channel, grad);
        add_to_corners(cell, factor, grad, grad_image + channel);
      }
    }
  });

  if constexpr (kPoints > 0) {
    if (want_points && writes) {
#pragma unroll
      for (int k = 0; k < kPoints; ++k) {
        const T value = mask_gradient(a.softmax, factors.at(k), grad_factors[k], mean);
        grad_mask[first_point + k] = Storage<S>::narrow(value);
      }
    }
  }
}

}  // namespace cuda
}  // namespace internimage
