// SPDX-License-Identifier: MIT
// The names of the gather kernels, and the choice among them for a problem. For a host compiler: the kernels may be
// compiled by nvcc (kernels.cuh has the function of each name), or at run time (../driver).
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../types.h"
#include "arguments.h"

namespace internimage {
namespace cuda {

// S is the storage type, or a stand-in of its size. What the parameters mean is said in kernels.cuh.
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
struct ForwardKernel {};
template <typename S, int kChannels, typename Index>
struct BackwardKernel {};
template <typename S, int kPoints, int kLanes, typename Index>
struct Backward3x3Kernel {};
template <typename S, typename Index>
struct DeterministicKernel {};

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
    return launch(ForwardKernel<S, kChannels, 0, false, uint64_t>(), threads, a, input, offset, mask, output);
  }
  const Arguments<Compute<S>, uint32_t> a(p, slices, 1, 1, threads);
  const auto run = [&](auto kernel) { launch(kernel, threads, a, input, offset, mask, output); };
  if constexpr (kChannels * sizeof(S) == kForwardBytes && sizeof(S) < 8) {
    if (is_3x3(p) && p.remove_center)
      return p.softmax ? run(ForwardKernel<S, kChannels, 8, true, uint32_t>())
                       : run(ForwardKernel<S, kChannels, 8, false, uint32_t>());
    if (is_3x3(p))
      return p.softmax ? run(ForwardKernel<S, kChannels, 9, true, uint32_t>())
                       : run(ForwardKernel<S, kChannels, 9, false, uint32_t>());
  }
  run(ForwardKernel<S, kChannels, 0, false, uint32_t>());
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

// The threads of a unit, if its channels are 8 for each of 2, 4, 8, 16 or 32; else 0.
inline int64_t lanes_of_3x3(const Problem& p) {
  const int64_t lanes = p.group_channels / kLaneChannels;
  const bool is_power = lanes >= 2 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  return is_3x3(p) && is_power && p.group_channels % kLaneChannels == 0 ? lanes : 0;
}

template <typename S, int kChannels, typename Launch>
void backward_of_width(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                       Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool wide, const Launch& launch) {
  int64_t lanes = 1;  // the largest power of two that gives each thread of a unit work
  while (lanes < 32 && p.group_channels % (2 * lanes * kChannels) == 0) lanes *= 2;
  const int64_t chunks = p.group_channels / (lanes * kChannels);
  const int64_t units = p.batch * p.out_height * p.out_width * p.groups, threads = units * lanes;
  const auto run = [&](auto kernel, int64_t count, const auto& a) {
    launch(kernel, count, a, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask);
  };
  if (wide || needs_wide_index(p, threads))
    return run(BackwardKernel<S, kChannels, uint64_t>(), threads,
               Arguments<Compute<S>, uint64_t>(p, 1, lanes, chunks, threads));
  if constexpr (kChannels > 1 && sizeof(S) < 8) {
    if (const int64_t own = lanes_of_3x3(p)) {
      const Arguments<Compute<S>, uint32_t> a(p, 1, own, 1, units * own);
      if (p.remove_center)
        return own == 2 ? run(Backward3x3Kernel<S, 8, 2, uint32_t>(), units * own, a)
                        : run(Backward3x3Kernel<S, 8, 0, uint32_t>(), units * own, a);
      return own == 2 ? run(Backward3x3Kernel<S, 9, 2, uint32_t>(), units * own, a)
                      : run(Backward3x3Kernel<S, 9, 0, uint32_t>(), units * own, a);
    }
  }
  run(BackwardKernel<S, kChannels, uint32_t>(), threads, Arguments<Compute<S>, uint32_t>(p, 1, lanes, chunks, threads));
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
      launch(DeterministicKernel<S, uint64_t>(), threads, Arguments<Compute<S>, uint64_t>(p, 1, 1, 1, threads),
             grad_output, offset, mask, grad_input);
    else
      launch(DeterministicKernel<S, uint32_t>(), threads, Arguments<Compute<S>, uint32_t>(p, 1, 1, 1, threads),
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
