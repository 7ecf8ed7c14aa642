// SPDX-License-Identifier: MIT
// The gather kernels on CUDA, and the function behind each name of select.h. Independent of torch: the tests also
// compile these files for a CPU (tests/cuda_host), with a stand-in for what CUDA provides.
//
// Loop nest, each kernel with one loop over threads that the GPU runs in parallel:
//
//   forward_kernel: for unit, for slice of its channels:                     one thread, up to 32 bytes of channels
//     factors of the unit's points: mask, or its softmax                     factors.cuh
//     for point of the unit:                                                 grid.cuh, unrolled for a 3x3 kernel
//       its cell: four corners and their bilinear shares                     points.cuh, from its offset (units.cuh)
//       for corner: sums += share * factor * corner, wide loads
//     store the sums
//
//   backward3x3_kernel: for unit, for lane:                                 one thread, 8 channels
//     as the next, but unrolled, and without chunks
//
//   backward_kernel: for unit, for lane:                                     one thread, 4 channels a chunk
//     factors of the unit's points
//     for point of the unit:
//       its cell
//       for chunk, for corner: dots[corner] += <grad_output, corner>
//       gradients of offset and factor from the dots, summed over the lanes by shuffles
//       for chunk, for corner: atomically grad_input[corner] += share * factor * grad_output
//     gradient of the mask: that of the factors, through the softmax if there is one
//
//   deterministic_kernel: for image, for channel:                            one thread; grad_input alone
//     for output pixel, for point of its unit, for corner: grad_input[corner] += share * factor * grad_output
//
// Variants, which serve only if they are asked for (variants.h): tiles.cuh and window.cuh process tiles of output
// pixels, fixed.cuh sums integers; each begins with what it does.
//
// Glossary:
//   unit    one output pixel of one group: it has P sampling points and group_channels channels
//   factor  what a point is multiplied by: its mask, or the softmax of the masks of its unit
//   cell    the four pixels (corners) around a point; share: the bilinear weight of one of them
//   slice   the channels of a unit that one thread of the forward computes
//   lane    one of the threads of a unit in the backward, a power of two of them within one warp
//   chunk   4 channels that a lane processes at a time; a lane with more than one chunk loops
//   S, T    storage type, in memory; compute type, in registers: float, or double for double. Values are widened when
//           they are loaded, and rounded once when they are stored
//   Index   of threads and of elements within an image: 32 bits where they suffice, else 64
//   layout  where the numbers of units stand in offset and mask, and in which order (arguments.h). On it depend the
//           strides and the order of x and y (units.cuh), and the order of the points (grid.cuh)
//
// Specific to DCNv3 is the softmax (factors.cuh).
#pragma once

#include "backward.cuh"
#include "backward3x3.cuh"
#include "deterministic.cuh"
#include "fixed.cuh"
#include "forward.cuh"
#include "select.h"
#include "tiles.cuh"
#include "window.cuh"

namespace internimage {
namespace cuda {

template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index, int kLayout>
auto function_of(ForwardKernel<S, kChannels, kPoints, kSoftmax, Index, kLayout>) {
  return &forward_kernel<S, kChannels, kPoints, kSoftmax, Index, kLayout>;
}
template <typename S, int kChannels, typename Index, int kLayout>
auto function_of(BackwardKernel<S, kChannels, Index, kLayout>) {
  return &backward_kernel<S, kChannels, Index, kLayout>;
}
template <typename S, int kPoints, int kLanes, typename Index, int kLayout>
auto function_of(Backward3x3Kernel<S, kPoints, kLanes, Index, kLayout>) {
  return &backward3x3_kernel<S, kPoints, kLanes, Index, kLayout>;
}
template <typename S, typename Index, int kLayout>
auto function_of(DeterministicKernel<S, Index, kLayout>) {
  return &deterministic_kernel<S, Index, kLayout>;
}
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
auto function_of(TilesKernel<S, kChannels, kPoints, kSoftmax, Index>) {
  return &tiles_kernel<S, kChannels, kPoints, kSoftmax, Index>;
}
template <typename S, int kPoints, typename Index>
auto function_of(WindowKernel<S, kPoints, Index>) {
  return &window_kernel<S, kPoints, Index>;
}
template <typename S, typename Index>
auto function_of(FixedRangeKernel<S, Index>) {
  return &fixed_range_kernel<S, Index>;
}
template <typename S, int kChannels, typename Index>
auto function_of(FixedSumKernel<S, kChannels, Index>) {
  return &fixed_sum_kernel<S, kChannels, Index>;
}
template <typename S, typename Index>
auto function_of(FixedSlowKernel<S, Index>) {
  return &fixed_slow_kernel<S, Index>;
}
template <typename S, typename Index>
auto function_of(FixedRoundKernel<S, Index>) {
  return &fixed_round_kernel<S, Index>;
}

}  // namespace cuda
}  // namespace internimage
