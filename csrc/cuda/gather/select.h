// SPDX-License-Identifier: MIT
// The names of the gather kernels, and the choice among them for a problem. For a host compiler: the kernels may be
// compiled by nvcc (kernels.cuh has the function of each name), or at run time (../driver).
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common.h"
#include "../types.h"
#include "arguments.h"
#include "variants.h"

namespace internimage {
namespace cuda {

// S is the storage type, or a stand-in of its size. What the parameters mean is said in kernels.cuh. The default
// kernels come with each layout of arguments.h, their variants with the dense one alone.
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index, int kLayout = kDense>
struct ForwardKernel {};
template <typename S, int kChannels, typename Index, int kLayout = kDense>
struct BackwardKernel {};
template <typename S, int kPoints, int kLanes, typename Index, int kLayout = kDense>
struct Backward3x3Kernel {};
template <typename S, typename Index, int kLayout = kDense>
struct DeterministicKernel {};
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
struct TilesKernel {};
template <typename S, int kPoints, typename Index>
struct WindowKernel {};
template <typename S, typename Index>
struct FixedRangeKernel {};
template <typename S, int kChannels, typename Index>
struct FixedSumKernel {};
template <typename S, typename Index>
struct FixedSlowKernel {};
template <typename S, typename Index>
struct FixedRoundKernel {};

// Threads of a block of a kernel.
template <typename Kernel>
constexpr int kBlockThreads = kThreads;
template <typename S, int kPoints, typename Index>
constexpr int kBlockThreads<WindowKernel<S, kPoints, Index>> = kWindowThreads;

// `launch(kernel, threads, arguments...)` runs a kernel in blocks of kBlockThreads<Kernel>. Tensors are not empty.
// Input and output and their gradients are contiguous and aligned to kForwardBytes; offset and mask and their gradients
// are where the problem says. `wide` forces 64-bit indices, for tests. With Launch::kHasVariants false, there are
// default kernels only, and `variants` has no effect; nor has it if the layout is not dense.
//
// With Launch::kHasLayouts false, each problem must be dense and its offsets aligned. That is so in both modules: there
// are twice as many kernels of other layouts as dense ones, some 20 MB of nvcc's or 0.2 MB of launches of NVRTC's, and
// DCNv3 needs none of them. An operator that does derives a Launch of its own where the constant is true.

// Whether the units' numbers are those of a dense tensor. There are no strides between groups if there is one group.
inline bool are_dense(const Problem& p, UnitStrides stride, int64_t unit_numbers) {
  return stride.pixel == p.groups * unit_numbers && (p.groups == 1 || stride.group == unit_numbers);
}

inline bool in_dense_layout(const Problem& p, bool with_gradients) {
  return !p.row_major && !p.y_first && are_dense(p, p.offset, 2 * p.points) && are_dense(p, p.mask, p.points) &&
         (!with_gradients || (are_dense(p, p.grad_offset, 2 * p.points) && are_dense(p, p.grad_mask, p.points)));
}

// Whether the two numbers of each offset are aligned to their size; true for null.
template <typename S>
bool is_even(const Problem& p, UnitStrides stride, const S* offset) {
  return offset == nullptr || (stride.pixel % 2 == 0 && (p.groups == 1 || stride.group % 2 == 0) &&
                               reinterpret_cast<uintptr_t>(offset) % (2 * sizeof(S)) == 0);
}

// Calls run(layout) with that of arguments.h, as the value of a type.
template <typename Launch, typename Run>
void with_layout(bool in_dense, bool even, const Run& run) {
  if constexpr (Launch::kHasLayouts) {
    if (!even) return run(std::integral_constant<int, kStridedOdd>());
    if (!in_dense) return run(std::integral_constant<int, kStridedEven>());
  }
  run(std::integral_constant<int, kDense>());
}

inline bool needs_wide_index(const Problem& p, int64_t threads) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  return threads >= kLimit || p.height * p.width * p.channels >= kLimit;
}

inline bool is_3x3(const Problem& p) { return p.kernel_h == 3 && p.kernel_w == 3; }

// The tile of the forward: at most 8 x 8 pixels, all of one size if that is possible, as the threads of pixels beyond
// the edge have nothing to do.
inline Tile forward_tile(const Problem& p) {
  const auto side = [](int64_t size) {
    const int64_t tiles = (size + kTileSide - 1) / kTileSide;
    return (size + tiles - 1) / tiles;
  };
  return {side(p.out_width), side(p.out_height)};
}

inline int64_t tiles_of_image(const Problem& p, Tile tile) {
  return ((p.out_width + tile.width - 1) / tile.width) * ((p.out_height + tile.height - 1) / tile.height);
}

// Calls run(kernel) with that of the template's instances that serves a 3x3 kernel.
template <template <typename, int, int, bool, typename> class Kernel, typename S, int kChannels, typename Run>
void forward_of_3x3(const Problem& p, const Run& run) {
  if (p.remove_center)
    return p.softmax ? run(Kernel<S, kChannels, 8, true, uint32_t>()) : run(Kernel<S, kChannels, 8, false, uint32_t>());
  return p.softmax ? run(Kernel<S, kChannels, 9, true, uint32_t>()) : run(Kernel<S, kChannels, 9, false, uint32_t>());
}

template <int kLayout>
struct WithLayout {
  template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
  using Forward = ForwardKernel<S, kChannels, kPoints, kSoftmax, Index, kLayout>;
};

template <typename S, int kChannels, int kLayout, typename Launch>
void forward_of_width(const Problem& p, const S* input, const S* offset, const S* mask, S* output, bool wide,
                      const Variants& variants, const Launch& launch) {
  const int64_t slices = p.group_channels / kChannels;
  const int64_t threads = p.batch * p.out_height * p.out_width * p.groups * slices;
  if (wide || needs_wide_index(p, threads)) {
    const Arguments<Compute<S>, uint64_t> a(p, slices, 1, 1, threads);
    return launch(ForwardKernel<S, kChannels, 0, false, uint64_t, kLayout>(), threads, a, input, offset, mask, output);
  }
  const Arguments<Compute<S>, uint32_t> a(p, slices, 1, 1, threads);
  const auto run = [&](auto kernel) { launch(kernel, threads, a, input, offset, mask, output); };
  if constexpr (kChannels * sizeof(S) == kForwardBytes && sizeof(S) < 8) {
    if constexpr (Launch::kHasVariants && kLayout == kDense) {
      const Tile tile = forward_tile(p);
      const int64_t of_tiles = p.batch * tiles_of_image(p, tile) * tile.width * tile.height * p.groups * slices;
      if (is_3x3(p) && variants.tiles && !needs_wide_index(p, of_tiles)) {
        const Arguments<Compute<S>, uint32_t> by_tiles(p, slices, 1, 1, of_tiles, tile);
        return forward_of_3x3<TilesKernel, S, kChannels>(
            p, [&](auto kernel) { launch(kernel, of_tiles, by_tiles, input, offset, mask, output); });
      }
    }
    if (is_3x3(p)) return forward_of_3x3<WithLayout<kLayout>::template Forward, S, kChannels>(p, run);
  }
  run(ForwardKernel<S, kChannels, 0, false, uint32_t, kLayout>());
}

template <typename S, typename Launch>
void forward(const Problem& p, const S* input, const S* offset, const S* mask, S* output, bool wide,
             const Variants& variants, const Launch& launch) {
  constexpr int kWidest = kForwardBytes / sizeof(S);
  with_layout<Launch>(in_dense_layout(p, false), is_even(p, p.offset, offset), [&](auto layout) {
    constexpr int kLayout = decltype(layout)::value;
    const auto run = p.group_channels % kWidest == 0         ? forward_of_width<S, kWidest, kLayout, Launch>
                     : p.group_channels % (kWidest / 2) == 0 ? forward_of_width<S, kWidest / 2, kLayout, Launch>
                                                             : forward_of_width<S, 1, kLayout, Launch>;
    run(p, input, offset, mask, output, wide, variants, launch);
  });
}

// The threads of a unit, if its channels are 8 for each of 2, 4, 8, 16 or 32; else 0.
inline int64_t lanes_of_3x3(const Problem& p) {
  const int64_t lanes = p.group_channels / kLaneChannels;
  const bool is_power = lanes >= 2 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  return is_3x3(p) && is_power && p.group_channels % kLaneChannels == 0 ? lanes : 0;
}

template <typename S, int kChannels, int kLayout, typename Launch>
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
    return run(BackwardKernel<S, kChannels, uint64_t, kLayout>(), threads,
               Arguments<Compute<S>, uint64_t>(p, 1, lanes, chunks, threads));
  if constexpr (kChannels > 1 && sizeof(S) < 8) {
    if (const int64_t own = lanes_of_3x3(p)) {
      const Arguments<Compute<S>, uint32_t> a(p, 1, own, 1, units * own);
      if (p.remove_center)
        return own == 2 ? run(Backward3x3Kernel<S, 8, 2, uint32_t, kLayout>(), units * own, a)
                        : run(Backward3x3Kernel<S, 8, 0, uint32_t, kLayout>(), units * own, a);
      return own == 2 ? run(Backward3x3Kernel<S, 9, 2, uint32_t, kLayout>(), units * own, a)
                      : run(Backward3x3Kernel<S, 9, 0, uint32_t, kLayout>(), units * own, a);
    }
  }
  run(BackwardKernel<S, kChannels, uint32_t, kLayout>(), threads,
      Arguments<Compute<S>, uint32_t>(p, 1, lanes, chunks, threads));
}

// The window kernel, for problems that it serves; whether it does.
template <typename S, typename Launch>
bool backward_by_windows(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                         Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool wide, const Launch& launch) {
  if constexpr (sizeof(S) == 2 && Launch::kHasVariants) {
    constexpr Tile kTile = {kWindowTileWidth, kWindowTileHeight};
    const int64_t threads = p.batch * tiles_of_image(p, kTile) * p.groups * kWindowThreads;
    if (!is_3x3(p) || p.group_channels != kWindowChannels || p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 ||
        p.dilation_w != 1 || wide || needs_wide_index(p, threads))
      return false;
    const Arguments<Compute<S>, uint32_t> a(p, 1, 1, 1, threads, kTile);
    const auto run = [&](auto kernel) {
      launch(kernel, threads, a, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask);
    };
    p.remove_center ? run(WindowKernel<S, 8, uint32_t>()) : run(WindowKernel<S, 9, uint32_t>());
    return true;
  }
  return false;
}

// Bits of a fixed-point product below those of the largest one, or fewer than kFixedLeast if there are too many terms
// of a sum: each point of an image may reach the same pixel, and the sum must stay below 2^63. Products are scaled to
// less than 2^kFixedProduct.
inline int fixed_bits(const Problem& p) {
  const double terms = static_cast<double>(p.out_height) * static_cast<double>(p.out_width) * p.points;
  int bits = 62 - kFixedProduct;
  for (double reached = 1; reached < terms; reached *= 2) --bits;
  return bits;
}

// How many zeros the deterministic backward of grad_input needs as its memory; 0 if it needs none.
template <typename S>
int64_t fixed_elements(const Problem& p, bool deterministic, const Variants& variants) {
  if (!deterministic || !variants.fixed || sizeof(S) == 8 || fixed_bits(p) < kFixedLeast || !in_dense_layout(p, true))
    return 0;
  return kFixedHeader + p.batch * p.height * p.width * p.channels;
}

// grad_input by fixed-point sums: their range, the sums, and what they are as floats; or, if the range is not finite,
// the deterministic kernel. The GPU decides.
template <typename S, typename Index, typename Launch>
void fixed_backward(const Problem& p, const S* grad_output, const S* offset, const S* mask, Compute<S>* grad_input,
                    uint64_t* memory, const Launch& launch) {
  const auto arguments = [&](int64_t slices, int64_t threads) {
    return Arguments<Compute<S>, Index>(p, slices, 1, 1, threads);
  };
  uint32_t* range = reinterpret_cast<uint32_t*>(memory);
  uint64_t* sums = memory + kFixedHeader;
  const int32_t bits = fixed_bits(p);
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const uint64_t grads = pixels * p.channels, masks = pixels * p.groups * p.points;
  const int64_t most = grads > masks ? grads : masks, in_blocks = (most + kThreads - 1) / kThreads * kThreads;
  const int64_t readers = in_blocks < kFixedReaders ? in_blocks : kFixedReaders;
  launch(FixedRangeKernel<S, Index>(), readers, arguments(1, readers), grad_output, grads, mask, masks, range);
  if (p.group_channels % (kFixedChannels * kFixedChannels) == 0) {
    const int64_t slices = p.group_channels / kFixedChannels, threads = pixels * p.groups * slices;
    launch(FixedSumKernel<S, kFixedChannels, Index>(), threads, arguments(slices, threads), grad_output, offset, mask,
           range, bits, sums);
  } else {
    const int64_t threads = pixels * p.channels;
    launch(FixedSumKernel<S, 1, Index>(), threads, arguments(p.group_channels, threads), grad_output, offset, mask,
           range, bits, sums);
  }
  const int64_t channels = p.batch * p.channels, elements = channels * p.height * p.width;
  launch(FixedSlowKernel<S, Index>(), channels, arguments(1, channels), grad_output, offset, mask, range, grad_input);
  launch(FixedRoundKernel<S, Index>(), elements, arguments(1, elements), sums, range, bits, grad_input);
}

template <typename S, int kLayout, typename Launch>
void backward_of_layout(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                        Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool deterministic, uint64_t* memory,
                        bool wide, const Variants& variants, const Launch& launch) {
  if (deterministic && grad_input != nullptr) {
    const int64_t threads = p.batch * p.channels;
    const int64_t units = p.batch * p.out_height * p.out_width * p.groups;
    const bool is_fixed = kLayout == kDense && fixed_elements<S>(p, deterministic, variants) > 0;
    const bool is_wide = wide || needs_wide_index(p, threads) || needs_wide_index(p, units) ||
                         (is_fixed && (needs_wide_index(p, units * p.group_channels) ||
                                       needs_wide_index(p, threads * p.height * p.width)));
    if (is_fixed) {
      if constexpr (sizeof(S) < 8 && Launch::kHasVariants && kLayout == kDense) {
        const auto run = is_wide ? fixed_backward<S, uint64_t, Launch> : fixed_backward<S, uint32_t, Launch>;
        run(p, grad_output, offset, mask, grad_input, memory, launch);
      }
    } else if (is_wide) {
      launch(DeterministicKernel<S, uint64_t, kLayout>(), threads, Arguments<Compute<S>, uint64_t>(p, 1, 1, 1, threads),
             grad_output, offset, mask, grad_input);
    } else {
      launch(DeterministicKernel<S, uint32_t, kLayout>(), threads, Arguments<Compute<S>, uint32_t>(p, 1, 1, 1, threads),
             grad_output, offset, mask, grad_input);
    }
    grad_input = nullptr;
  }
  if (grad_input == nullptr && grad_offset == nullptr) return;
  if (kLayout == kDense && variants.window &&
      backward_by_windows(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, wide, launch))
    return;
  const auto run = p.group_channels % kBackwardChannels == 0 ? backward_of_width<S, kBackwardChannels, kLayout, Launch>
                                                             : backward_of_width<S, 1, kLayout, Launch>;
  run(p, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, wide, launch);
}

// grad_input may be null, or both grad_offset and grad_mask. `memory` has fixed_elements zeros.
template <typename S, typename Launch>
void backward(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
              Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool deterministic, uint64_t* memory, bool wide,
              const Variants& variants, const Launch& launch) {
  const bool even = is_even(p, p.offset, offset) && is_even<S>(p, p.grad_offset, grad_offset);
  with_layout<Launch>(in_dense_layout(p, grad_offset != nullptr), even, [&](auto layout) {
    backward_of_layout<S, decltype(layout)::value>(p, grad_output, input, offset, mask, grad_input, grad_offset,
                                                   grad_mask, deterministic, memory, wide, variants, launch);
  });
}

}  // namespace cuda
}  // namespace internimage
