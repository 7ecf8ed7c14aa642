// SPDX-License-Identifier: MIT
// The gather kernels on CUDA, and the choice among them for a problem. Independent of torch: the tests also compile
// these files for a CPU (tests/cuda_host), with a stand-in for what CUDA provides.
//
// Loop nest, each kernel with one loop over threads that the GPU runs in parallel:
//
//   forward_kernel: for unit, for slice of its channels:                     one thread, up to 32 bytes of channels
//     factors of the unit's points: mask, or its softmax                     factors.cuh
//     for point of the unit:                                                 grid.cuh, unrolled for a 3x3 kernel
//       its cell: four corners and their bilinear shares                     points.cuh
//       for corner: sums += share * factor * corner, wide loads
//     store the sums
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
//
// Specific to DCNv3 are the order of the points (grid.cuh), that of the offsets, (x, y) (points.cuh), and the softmax
// (factors.cuh).
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../storage.cuh"
#include "arguments.cuh"
#include "backward.cuh"
#include "deterministic.cuh"
#include "forward.cuh"

namespace internimage {
namespace cuda {

// `launch(kernel, threads, arguments...)` runs a kernel in blocks of kThreads. Tensors are contiguous, not empty, and
// aligned to kForwardBytes. `wide` forces 64-bit indices, for tests.

inline bool needs_wide_index(const Problem& p, int64_t threads) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  return threads >= kLimit || p.height * p.width * p.channels >= kLimit;
}

inline bool is_3x3(const Problem& p) { return p.kernel_h == 3 && p.kernel_w == 3; }

template <typename S, int kChannels, typename Launch>
void forward_of_width(const Problem& p, const S* input, const S* offset, const S* mask, S* output, bool wide,
                      const Launch& launch) {
  const int64_t slices = p.group_channels / kChannels;
  const int64_t threads = p.batch * p.out_height * p.out_width * p.groups * slices;
  if (wide || needs_wide_index(p, threads)) {
    const Arguments<Compute<S>, uint64_t> a(p, slices, 1, 1, threads);
    return launch(forward_kernel<S, kChannels, 0, false, uint64_t>, threads, a, input, offset, mask, output);
  }
  const Arguments<Compute<S>, uint32_t> a(p, slices, 1, 1, threads);
  if constexpr (kChannels * sizeof(S) == kForwardBytes && sizeof(S) < 8) {
    if (is_3x3(p)) {
      auto kernel = p.softmax ? forward_kernel<S, kChannels, 9, true, uint32_t>
                              : forward_kernel<S, kChannels, 9, false, uint32_t>;
      if (p.remove_center)
        kernel = p.softmax ? forward_kernel<S, kChannels, 8, true, uint32_t>
                           : forward_kernel<S, kChannels, 8, false, uint32_t>;
      return launch(kernel, threads, a, input, offset, mask, output);
    }
  }
  launch(forward_kernel<S, kChannels, 0, false, uint32_t>, threads, a, input, offset, mask, output);
}

template <typename S, typename Launch>
void forward(const Problem& p, const S* input, const S* offset, const S* mask, S* output, bool wide,
             const Launch& launch) {
  constexpr int kWidest = kForwardBytes / sizeof(S);
  const auto run = p.group_channels % kWidest == 0         ? forward_of_width<S, kWidest, Launch>
                   : p.group_channels % (kWidest / 2) == 0 ? forward_of_width<S, kWidest / 2, Launch>
                                                           : forward_of_width<S, 1, Launch>;
  run(p, input, offset, mask, output, wide, launch);
}

template <typename S, int kChannels, typename Launch>
void backward_of_width(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                       Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool wide, const Launch& launch) {
  int64_t lanes = 1;  // the largest power of two that gives each thread of a unit work
  while (lanes < 32 && p.group_channels % (2 * lanes * kChannels) == 0) lanes *= 2;
  const int64_t chunks = p.group_channels / (lanes * kChannels);
  const int64_t threads = p.batch * p.out_height * p.out_width * p.groups * lanes;
  if (wide || needs_wide_index(p, threads)) {
    const Arguments<Compute<S>, uint64_t> a(p, 1, lanes, chunks, threads);
    return launch(backward_kernel<S, kChannels, 0, uint64_t>, threads, a, grad_output, input, offset, mask, grad_input,
                  grad_offset, grad_mask);
  }
  const Arguments<Compute<S>, uint32_t> a(p, 1, lanes, chunks, threads);
  auto kernel = backward_kernel<S, kChannels, 0, uint32_t>;
  if constexpr (kChannels > 1 && sizeof(S) < 8) {
    if (is_3x3(p) && chunks == 1)
      kernel =
          p.remove_center ? backward_kernel<S, kChannels, 8, uint32_t> : backward_kernel<S, kChannels, 9, uint32_t>;
  }
  launch(kernel, threads, a, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask);
}

// grad_input may be null, or both grad_offset and grad_mask.
template <typename S, typename Launch>
void backward(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
              Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool deterministic, bool wide,
              const Launch& launch) {
  if (deterministic && grad_input != nullptr) {
    const int64_t threads = p.batch * p.channels;
    const int64_t units = p.batch * p.out_height * p.out_width * p.groups;
    if (wide || needs_wide_index(p, threads) || needs_wide_index(p, units))
      launch(deterministic_kernel<S, uint64_t>, threads, Arguments<Compute<S>, uint64_t>(p, 1, 1, 1, threads),
             grad_output, offset, mask, grad_input);
    else
      launch(deterministic_kernel<S, uint32_t>, threads, Arguments<Compute<S>, uint32_t>(p, 1, 1, 1, threads),
             grad_output, offset, mask, grad_input);
    grad_input = nullptr;
  }
  if (grad_input == nullptr && grad_offset == nullptr) return;
  const auto run = p.group_channels % kBackwardChannels == 0 ? backward_of_width<S, kBackwardChannels, Launch>
                                                             : backward_of_width<S, 1, Launch>;
  run(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, wide, launch);
}

}  // namespace cuda
}  // namespace internimage
