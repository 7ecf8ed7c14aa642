// SPDX-License-Identifier: MIT
// Backward of a 3x3 kernel: 8 channels a thread. The threads of a unit (its lanes), at least two, are adjacent in a
// warp and sum their parts of the gradients of offset and mask by shuffles. Straight-line code.
//
// The channels of a lane are not all adjacent; what the lanes of a unit load, or add to, with one instruction is. An
// atomic addition takes 4 floats, so that two lanes add to a sector of the L2 cache (32 bytes) at once. A load of 16
// bytes has 8 channels of a half type: a lane then adds to other channels than it loads.
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

// Blocks per multiprocessor that the compiler must leave registers for: three (80), or two where it would spill some.
template <typename S, int kLanes>
constexpr int kBackwardBlocks = kLanes > 0 || sizeof(S) < 4 ? 3 : 2;

// grad_input is filled with zeros and of the compute type. It may be null, or both grad_offset and grad_mask.
// kLanes: threads of a unit, a power of two; 0 if that is known at launch alone.
template <typename S, int kPoints, int kLanes, typename Index, int kLayout = kDense>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<S, kLanes>)
    backward3x3_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                       const S* __restrict__ input, const S* __restrict__ offset, const S* __restrict__ mask,
                       Compute<S>* __restrict__ grad_input, S* __restrict__ grad_offset, S* __restrict__ grad_mask) {
  using T = Compute<S>;
  constexpr int kVector = 16 / sizeof(S), kVectors = kLaneChannels / kVector, kQuads = kLaneChannels / 4;
  Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  // An excess thread takes part in the shuffles of its warp: it is one of the last unit, but all its points are
  // nowhere, so that it adds nothing, and it stores nothing.
  const bool is_active = thread < a.threads;
  thread = is_active ? thread : a.threads - 1;
  const uint32_t lanes = kLanes > 0 ? kLanes : a.lanes;
  const Index index = kLanes > 0 ? thread / kLanes : thread >> a.lane_bits;
  const uint32_t lane = static_cast<uint32_t>(thread) & (lanes - 1);
  Unit<T, Index> unit(a, index);
  if (!is_active) unit.x = __uint_as_float(0x7fffffffu);  // NaN
  const uint64_t first_channel = unit.image * a.image_elements + unit.group * a.group_channels;
  const S* image = materialize(input + first_channel + lane * kVector);
  T* grad_image = materialize(grad_input + first_channel + lane * 4);  // not used if null
  grad_output += static_cast<uint64_t>(index) * a.group_channels;
  T grad[kVectors][kVector], others[kQuads][4];  // for the products, and for the additions where that is not the same
#pragma unroll
  for (int i = 0; i < kVectors; ++i) load<S, kVector>(grad_output + (i * lanes + lane) * kVector, grad[i]);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if constexpr (kVector > 4) load<S, 4>(grad_output + (i * lanes + lane) * 4, others[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      keep(grad[i * 4 / kVector][(i * 4 + j) % kVector]);
      if constexpr (kVector > 4) keep(others[i][j]);
    }
  }
  const Places<kLayout> places(a, unit, index, kPoints);
  offset += places.offset(0);
  const Factors<S, kPoints> factors(mask + places.mask(0), kPoints, a.softmax);
  const bool want_points = grad_offset != nullptr;
  grad_offset += places.grad_offset(lane);
  grad_mask += places.grad_mask(lane);
  // Lane 0 stores the gradients of even points, lane 1 those of odd ones, with one instruction.
  const bool writes = is_active && lane < 2, is_odd = lane == 1;
  constexpr int kPairs = (kPoints + 1) / 2;
  T own_grads[kPairs], own_factors[kPairs];  // of the factors whose gradients this lane stores
  T even_shift[2], even_grad;
  T mean = 0;  // sum of factor * its gradient, for the softmax
  for_each_point<kPoints, kLayout>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S, kLayout>(a, unit, offset, k, grid_x, grid_y);
    const T factor = cell.inside ? factors.at(k) : T(0);
    if (want_points) {
      T dots[4], sums[3], shift[2];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        dots[corner] = 0;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          T values[kVector];
          cell.template read<S, kVector>(corner, image + i * lanes * kVector, values);
#pragma unroll
          for (int j = 0; j < kVector; ++j) dots[corner] += grad[i][j] * values[j];
        }
      }
      differentiate(cell, dots, sums);
      sum_over_lanes<kLanes>(a, sums);
      shift_gradient(a, cell, factor, sums, shift);
      const T grad_factor = cell.inside ? sums[2] : T(0);
      mean += factors.at(k) * grad_factor;
      if (k % 2 == 0) {
        even_shift[0] = shift[0];
        even_shift[1] = shift[1];
        even_grad = grad_factor;
      }
      if (k % 2 == 1 || k == kPoints - 1) {
        const T own[2] = {is_odd ? shift[0] : even_shift[0], is_odd ? shift[1] : even_shift[1]};
        if (writes && (k % 2 == 1 || !is_odd)) store_shift<kLayout>(a, grad_offset + 2 * (k - k % 2), own);
        own_grads[k / 2] = is_odd ? grad_factor : even_grad;
        own_factors[k / 2] = is_odd ? factors.at(k) : factors.at(k - k % 2);
      }
    }
    if (grad_input != nullptr) {
      if constexpr (kVector > 4)
        add_to_corners(cell, factor, others, grad_image, lanes * 4);
      else
        add_to_corners(cell, factor, grad, grad_image, lanes * 4);
    }
  });

  if (want_points && writes) {
#pragma unroll
    for (int k = 0; k < kPoints; k += 2) {
      const T value = mask_gradient(a.softmax, own_factors[k / 2], own_grads[k / 2], mean);
      if (k + 1 < kPoints || !is_odd) grad_mask[k] = Storage<S>::narrow(value);
    }
  }
}

}  // namespace cuda
}  // namespace internimage
