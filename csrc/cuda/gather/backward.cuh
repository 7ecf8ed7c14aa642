// SPDX-License-Identifier: MIT
// Backward of any kernel: a thread processes chunks of 4 channels, as atomic additions of floats are 4 wide, or of 1;
// the threads of a unit (its lanes) are adjacent in a warp, and sum their parts of the gradients of offset and mask by
// shuffles.
#pragma once

#include <cstdint>

#include "../storage.cuh"
#include "../types.h"
#include "arguments.h"
#include "factors.cuh"
#include "gradients.cuh"
#include "grid.cuh"
#include "points.cuh"
#include "units.cuh"

namespace internimage {
namespace cuda {

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

// grad_input is filled with zeros and of the compute type. It may be null, or both grad_offset and grad_mask.
template <typename S, int kChannels, typename Index, int kLayout = kDense>
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
  T grad[1][kChannels];
  load<S, kChannels>(grad_output, grad[0]);
  const Places<kLayout> places(a, unit, index, a.points);
  offset += places.offset(0);
  const Factors<S, 0> factors(mask + places.mask(0), a.points, a.softmax);
  const bool writes = is_active && lane == 0;
  const bool want_points = grad_offset != nullptr;

  T mean = 0;  // sum of factor * its gradient, for the softmax: an extra pass, as there may be too many points to keep
  if (want_points && a.softmax) {
    T sums[1] = {0};
    for_each_point<0, kLayout>(a, [&](int k, T grid_x, T grid_y) {
      const Cell<T, Index> cell = locate<S, kLayout>(a, unit, offset, k, grid_x, grid_y);
      T dots[4];
      dot_corners<S, kChannels>(a, cell, image, grad_output, a.chunks, grad[0], dots);
      sums[0] += cell.inside ? factors.at(k) * interpolate(cell, dots) : T(0);
    });
    sum_over_lanes<0>(a, sums);
    mean = sums[0];
  }

  for_each_point<0, kLayout>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S, kLayout>(a, unit, offset, k, grid_x, grid_y);
    const T factor = cell.inside ? factors.at(k) : T(0);
    if (want_points) {
      T dots[4], sums[3], shift[2];
      dot_corners<S, kChannels>(a, cell, image, grad_output, a.chunks, grad[0], dots);
      differentiate(cell, dots, sums);
      sum_over_lanes<0>(a, sums);
      shift_gradient(a, cell, factor, sums, shift);
      if (writes) {
        const T grad_factor = cell.inside ? sums[2] : T(0);
        store_shift<kLayout>(a, grad_offset + places.grad_offset(k), shift);
        grad_mask[places.grad_mask(k)] = Storage<S>::narrow(mask_gradient(a.softmax, factors.at(k), grad_factor, mean));
      }
    }
    if (grad_input != nullptr && is_active && cell.inside) {
#pragma unroll 1
      for (uint32_t chunk = 0; chunk < a.chunks; ++chunk) {
        const uint32_t channel = chunk * a.lanes * kChannels;
        if (a.chunks > 1) load<S, kChannels>(grad_output + channel, grad[0]);
        add_to_corners(cell, factor, grad, grad_image + channel, 0);
      }
    }
  });
}

}  // namespace cuda
}  // namespace internimage
