// SPDX-License-Identifier: MIT
// The gradient of the input, with the same bits each time.
#pragma once

#include <cstdint>

#include "../storage.cuh"
#include "../types.h"
#include "arguments.h"
#include "factors.cuh"
#include "grid.cuh"
#include "points.cuh"
#include "units.cuh"

namespace internimage {
namespace cuda {

// Each thread owns a channel of an image and visits all points that sampled it in a fixed order. Slow, as there are no
// more threads than channels in the batch.
template <typename S, int kLayout = kDense, typename Index>
__device__ __forceinline__ void sum_in_order(const Arguments<Compute<S>, Index>& a, Index thread,
                                             const S* __restrict__ grad_output, const S* __restrict__ offset,
                                             const S* __restrict__ mask, Compute<S>* __restrict__ grad_input) {
  using T = Compute<S>;
  if (thread >= a.threads) return;
  const Index image = thread / a.channels;
  const uint32_t channel = static_cast<uint32_t>(thread - image * a.channels);
  const uint32_t group = channel / a.group_channels;
  const uint64_t pixels = static_cast<uint64_t>(a.out_rows) * a.out_columns;
  T* grad_image = grad_input + image * a.image_elements + channel;
  for (uint64_t pixel = image * pixels; pixel < (image + 1) * pixels; ++pixel) {
    const uint64_t index = pixel * a.groups.divisor + group;
    const Unit<T, Index> unit(a, static_cast<Index>(index));
    const Places<kLayout> places(a, unit, index, a.points);
    const S* shifts = offset + places.offset(0);
    const Factors<S, 0> factors(mask + places.mask(0), a.points, a.softmax);
    const T grad = Storage<S>::widen(__ldg(grad_output + pixel * a.channels + channel));
    for_each_point<0, kLayout>(a, [&](int k, T grid_x, T grid_y) {
      const Cell<T, Index> cell = locate<S, kLayout>(a, unit, shifts, k, grid_x, grid_y);
      const T factor = cell.inside ? factors.at(k) : T(0);
      T sums[4];  // all four are loaded before one is stored: no two corners are the same
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) sums[corner] = cell.has(corner) ? grad_image[cell.at(corner)] : T(0);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
        if (cell.has(corner)) grad_image[cell.at(corner)] = sums[corner] + factor * cell.weight(corner) * grad;
    });
  }
}

template <typename S, typename Index, int kLayout = kDense>
__global__ void __launch_bounds__(kThreads, 2)
    deterministic_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                         const S* __restrict__ offset, const S* __restrict__ mask,
                         Compute<S>* __restrict__ grad_input) {
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  sum_in_order<S, kLayout>(a, thread, grad_output, offset, mask, grad_input);
}

}  // namespace cuda
}  // namespace internimage
