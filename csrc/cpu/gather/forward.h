// SPDX-License-Identifier: MIT
// The forward pass, vectorized over channels: for each unit, the weighted sum of its points' corners; or, for each of
// its points, that of the point's corners.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/shuffle.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "grid.h"
#include "load.h"
#include "locate.h"
#include "plane.h"
#include "points.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Computes M vectors of N channels of the unit whose points begin at t. kPoints and kChannels are `points` and
// `channels` where these are known at compile time, else 0.
template <typename S, typename T, int N, int M, int kPoints, int kChannels>
INTERNIMAGE_INLINE void gather_channels(const Points<T>& s, int64_t t, int64_t points, const T* plane, int64_t row,
                                        int64_t channels, S* out) {
  using V = Vector<T, N>;
  // one sum per corner where registers allow it: shorter chains of dependent additions
  constexpr int kSums = M <= 2 ? 4 : 2;
  V sum[kSums][M];
  for (int i = 0; i < kSums; ++i)
    for (int m = 0; m < M; ++m) sum[i][m] = V{};
  const T *w0 = s.weight[0] + t, *w1 = s.weight[1] + t, *w2 = s.weight[2] + t, *w3 = s.weight[3] + t;
  const int32_t* pixel = s.pixel + t;
  const int64_t step = kChannels > 0 ? kChannels : channels;
  const T* plane_below = plane + row;
  asm("" : "+r"(plane_below));  // keeps the pointer in a register; GCC would add `row` again for every point
  // adds point k, whose weights are `first` to `fourth`: scalars, or vectors of one value
  const auto add = [&](int64_t k, auto first, auto second, auto third, auto fourth) __attribute__((always_inline)) {
    const int64_t at = pixel[k] * step;
    const T *upper = plane + at, *lower = plane_below + at;
    for (int m = 0; m < M; ++m) {
      sum[0][m] += load<V>(upper + m * N) * first;
      sum[1][m] += load<V>(upper + step + m * N) * second;
      sum[2 % kSums][m] += load<V>(lower + m * N) * third;
      sum[3 % kSums][m] += load<V>(lower + step + m * N) * fourth;
    }
  };
  if constexpr (kPoints == 9 && N == 16) {
    // A vector holds a corner's weights of all points. A lane that a shuffle spreads does not compete with the corners
    // for the load ports, which limit the rate; AMD's Zen 4 loads one vector of this width per clock.
    const V a = load<V>(w0), b = load<V>(w1), c = load<V>(w2), d = load<V>(w3);
    const auto spread = [&](auto number) __attribute__((always_inline)) {
      constexpr int k = decltype(number)::value;
      const auto lane = [](int) { return k; };
      add(k, shuffle<V, N>(a, a, lane), shuffle<V, N>(b, b, lane), shuffle<V, N>(c, c, lane),
          shuffle<V, N>(d, d, lane));
    };
    for_numbers<kPoints>(spread);
  } else if constexpr (kPoints > 0) {
#pragma GCC unroll 9
    for (int64_t k = 0; k < kPoints; ++k) add(k, w0[k], w1[k], w2[k], w3[k]);
  } else {
    for (int64_t k = 0; k < points; ++k) add(k, w0[k], w1[k], w2[k], w3[k]);
  }
  for (int m = 0; m < M; ++m) {
    V all = sum[0][m] + sum[1][m];
    if constexpr (kSums == 4) all += sum[2][m] + sum[3][m];
    Convert<S, T, N>::store(out + m * N, all);
  }
}

// Computes all `width` channels: 16 at a time, then whole vectors, then half vectors, down to single channels.
template <typename S, typename T, int N, int kPoints>
INTERNIMAGE_INLINE void gather_unit(const Points<T>& s, int64_t t, int64_t points, const T* plane, int64_t row,
                                    int64_t channels, int64_t width, S* out) {
  int64_t c = 0;
  if constexpr (N == kLanes<T> && N < 16) {
    for (; c + 16 <= width; c += 16)
      gather_channels<S, T, N, 16 / N, kPoints, 0>(s, t, points, plane + c, row, channels, out + c);
  }
  for (; c + N <= width; c += N)
    gather_channels<S, T, N, 1, kPoints, 0>(s, t, points, plane + c, row, channels, out + c);
  if constexpr (N > 1) {
    if (c < width) gather_unit<S, T, N / 2, 0>(s, t, points, plane + c, row, channels, width - c, out + c);
  }
}

// Computes the sample of one point, `width` channels: whole vectors, then half vectors, down to single channels.
template <typename S, typename T, int N>
INTERNIMAGE_INLINE void sample_point(const T (&weight)[4], const T* upper, const T* lower, int64_t channels,
                                     int64_t width, S* out) {
  using V = Vector<T, N>;
  int64_t c = 0;
  for (; c + N <= width; c += N)
    Convert<S, T, N>::store(out + c, (load<V>(upper + c) * weight[0] + load<V>(upper + channels + c) * weight[1]) +
                                         (load<V>(lower + c) * weight[2] + load<V>(lower + channels + c) * weight[3]));
  if constexpr (N > 1) {
    if (c < width) sample_point<S, T, N / 2>(weight, upper + c, lower + c, channels, width - c, out + c);
  }
}

// Computes the samples of the unit whose points begin at t; `step` elements from one point's to the next's.
template <typename S, typename T>
INTERNIMAGE_INLINE void sample_unit(const Points<T>& s, int64_t t, int64_t points, const T* plane, int64_t row,
                                    int64_t channels, S* out, int64_t step) {
  for (int64_t k = 0; k < points; ++k, out += step) {
    const T* upper = plane + s.pixel[t + k] * channels;
    const T weight[4] = {s.weight[0][t + k], s.weight[1][t + k], s.weight[2][t + k], s.weight[3][t + k]};
    sample_point<S, T, kLanes<T>>(weight, upper, upper + row, channels, channels, out);
  }
}

// Prefetches what the next strip will read, a little with each unit of this one; strips are contiguous in memory.
// Prefetching past the end of a tensor does not fault.
template <typename S>
struct Prefetch {
  uintptr_t offset, mask, input;

  Prefetch(const Problem& p, const S* input_tensor, const S* offset_tensor, const S* mask_tensor, int64_t pixel,
           int64_t first_group)
      : offset((uintptr_t)offset_tensor + (pixel * p.offset.pixel + first_group * p.offset.group) * sizeof(S)),
        mask((uintptr_t)mask_tensor + (pixel * p.mask.pixel + first_group * p.mask.group) * sizeof(S)),
        // a guess, right if the output has the input's size: the row that the next strip is the first to need
        input((uintptr_t)input_tensor +
              ((pixel + 3 * p.width) * p.channels + first_group * p.group_channels) * sizeof(S)) {}

  INTERNIMAGE_INLINE void next_unit(const Problem& p) {
    __builtin_prefetch((const void*)offset);
    __builtin_prefetch((const void*)(offset + 64));
    __builtin_prefetch((const void*)mask);
    __builtin_prefetch((const void*)input);
    offset += p.offset.group * sizeof(S);
    mask += p.mask.group * sizeof(S);
    input += p.group_channels * sizeof(S);
  }
};

// The forward pass as a sequence of independent tasks: the strips of each block of each image. kColumns: the output has
// the samples of all points, of which an output pixel's are adjacent; else their sum.
template <typename S, typename T, bool kColumns = false>
struct Forward {
  const Problem& p;
  Blocks blocks;
  StripShape shape;

  explicit Forward(const Problem& problem)
      : p(problem), blocks(problem, groups_in_cache<T>(problem, 1)), shape(problem, blocks.size) {}

  int64_t tasks() const { return p.batch * blocks.count * shape.count(); }
  int64_t scratch_bytes() const { return Points<T>::bytes(shape) + Plane<T>::bytes(p, blocks.size); }

  template <int kPoints, int kChannels>
  void run_tasks(const S* input, const S* offset, const S* mask, S* output, void* scratch, int64_t begin,
                 int64_t end) const {
    const Points<T> s(scratch, shape);
    InputPlane<S, T> plane(p, (char*)scratch + Points<T>::bytes(shape));
    const int64_t image_size = p.height * p.width * p.channels, row = plane.pitch * p.group_channels;
    int64_t current = -1, first_group = 0, group_count = 0;  // the current image and block
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image_and_block = task / shape.count(), n = image_and_block / blocks.count;
      if (image_and_block != current) {
        const int64_t block = image_and_block % blocks.count;
        const bool other_count = group_count != blocks.groups(block);
        first_group = blocks.begin(block);
        group_count = blocks.groups(block);
        plane.reset(input + n * image_size + first_group * p.group_channels, group_count);
        if (other_count) fill_grid(p, shape, s, group_count);
        current = image_and_block;
      }
      const Strip strip(p, shape, task % shape.count(), n);
      load_points(p, strip, s, offset, mask, first_group, group_count);
      plane.ensure(locate<T, false>(p, strip, s, strip.pixels * group_count * p.points, plane.pitch));
      Prefetch<S> prefetch(p, input, offset, mask, strip.first_pixel + strip.pixels, first_group);
      int64_t t = 0;
      for (int64_t i = 0; i < strip.pixels; ++i) {
        S* out =
            output + (strip.first_pixel + i) * p.channels * (kColumns ? p.points : 1) + first_group * p.group_channels;
        const T* group = plane.data;
        for (int64_t g = 0; g < group_count; ++g, t += p.points, out += p.group_channels, group += plane.size) {
          prefetch.next_unit(p);
          if constexpr (kColumns) {
            sample_unit<S, T>(s, t, p.points, group, row, p.group_channels, out, p.channels);
          } else if constexpr (kChannels == 16) {
            constexpr int N = kLanes<T> < 16 ? kLanes<T> : 16;
            gather_channels<S, T, N, 16 / N, kPoints, 16>(s, t, p.points, group, row, 16, out);
          } else {
            gather_unit<S, T, kLanes<T>, kPoints>(s, t, p.points, group, row, p.group_channels, p.group_channels, out);
          }
        }
      }
    }
  }

  void run(const S* input, const S* offset, const S* mask, S* output, void* scratch, int64_t begin, int64_t end) const {
    constexpr bool kSpecial = kIsSpecialized<S> && !kColumns;
    if (kSpecial && p.points == 9 && p.group_channels == 16)
      run_tasks<kSpecial ? 9 : 0, kSpecial ? 16 : 0>(input, offset, mask, output, scratch, begin, end);
    else if (kSpecial && p.points == 9)
      run_tasks<kSpecial ? 9 : 0, 0>(input, offset, mask, output, scratch, begin, end);
    else
      run_tasks<0, 0>(input, offset, mask, output, scratch, begin, end);
  }
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
