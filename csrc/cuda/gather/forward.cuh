// SPDX-License-Identifier: MIT
// Forward: a thread computes a slice of a unit's channels, as many as 32 bytes hold (16 of a half type), and locates
// each sampling point once for all of them.
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

static_assert(kForwardBytes <= sizeof(Zeros), "what a thread loads at once");

// Blocks per multiprocessor that the compiler must leave registers for; 0 is its own choice. It would take fewer
// registers than four blocks leave (64), and wait for each load sooner: of a half type on compute capability 9.0, a
// thread has 3.9 wide loads under way on average instead of 1.5, for 2 to 10 registers that are spilled. With the
// softmax it would take more registers. Compute capability 7.5 would spill too many.
#if __CUDA_ARCH__ >= 800
#define INTERNIMAGE_FORWARD_BLOCKS 4
#else
#define INTERNIMAGE_FORWARD_BLOCKS 0
#endif

template <int kPoints>
constexpr int kForwardBlocks = kPoints == 0 ? 3 : INTERNIMAGE_FORWARD_BLOCKS;

// A slice of a unit: the channels from slice * kChannels on. `thread` is where the slice is in the output. kSoftmax is
// used only if kPoints > 0; with any other number of points it is a.softmax.
template <typename S, int kChannels, int kPoints, bool kSoftmax, int kLayout = kDense, typename Index>
__device__ __forceinline__ void forward_slice(const Arguments<Compute<S>, Index>& a,
                                              const Unit<Compute<S>, Index>& unit, Index index, Index slice,
                                              Index thread, const S* __restrict__ input, const S* __restrict__ offset,
                                              const S* __restrict__ mask, S* __restrict__ output) {
  using T = Compute<S>;
  // A thread that needs 32 bytes of a pixel loads them in two halves. Of eight adjacent threads, which are served at
  // once, four begin with the second half: if all began with the first, they would use half of the cache's banks.
  constexpr int kHalves = kChannels * sizeof(S) / 16 > 0 ? kChannels * sizeof(S) / 16 : 1, kHalf = kChannels / kHalves;
  const uint32_t begin = kHalves == 2 && threadIdx.x % 8 >= 4 ? kHalf : 0;
  const S* image =
      materialize(input + unit.image * a.image_elements + (unit.group * a.group_channels + slice * kChannels + begin));
  const S* zeros = reinterpret_cast<const S*>(&zero_row) + begin;
  const int points = kPoints > 0 ? kPoints : a.points;
  const Places<kLayout> places(a, unit, index, points);
  offset += places.offset(0);
  const Factors<S, kPoints> factors(mask + places.mask(0), points, kPoints > 0 ? kSoftmax : a.softmax);
  T sums[kHalves][kHalf] = {};
  for_each_point<kPoints, kLayout>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S, kLayout>(a, unit, offset, k, grid_x, grid_y);
    const T factor = cell.inside ? factors.at(k) : T(0);  // whatever it is, even NaN
    const T row_weights[2] = {factor * (1 - cell.below), factor * cell.below};
    const Index lower = cell.upper_left + cell.step_y;
    const Index corners[4] = {cell.upper_left, cell.upper_left + cell.step_x, lower, lower + cell.step_x};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const S* from = cell.has(corner) ? image + corners[corner] : zeros;
      const T weight = (corner % 2 ? cell.right : 1 - cell.right) * row_weights[corner / 2];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        T values[kHalf];
        load<S, kHalf>(half == 0 ? from : other_half(from), values);
#pragma unroll
        for (int i = 0; i < kHalf; ++i) sums[half][i] += weight * values[i];
      }
    }
  });
  output += static_cast<uint64_t>(thread) * kChannels;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) store<S, kHalf>(output + (half == 0 ? begin : kHalf - begin), sums[half]);
}

template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index, int kLayout = kDense>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kPoints>)
    forward_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ input, const S* __restrict__ offset,
                   const S* __restrict__ mask, S* __restrict__ output) {
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  const Index index = quotient(thread, a.slices);
  const Unit<Compute<S>, Index> unit(a, index);
  const Index slice = thread - index * a.slices.divisor;
  forward_slice<S, kChannels, kPoints, kSoftmax, kLayout>(a, unit, index, slice, thread, input, offset, mask, output);
}

}  // namespace cuda
}  // namespace internimage
