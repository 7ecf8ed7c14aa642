// SPDX-License-Identifier: MIT
// The backward pass: adds each unit's gradient to the gradients of its corners, and computes its dot products with the
// corners.
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
#include "softmax.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// For M vectors of N channels of the unit whose points begin at t: adds to the gradients of the corners (one at a time,
// as points may share them), and adds to each point's four dot products, or sets them if kFirst.
template <typename S, typename T, int N, int M, bool kInput, bool kDots, bool kFirst, int kPoints, int kChannels>
INTERNIMAGE_INLINE void scatter_channels(const Points<T>& s, int64_t t, int64_t points, const T* plane, T* grad_plane,
                                         int64_t row, int64_t channels, const S* grad) {
  using V = Vector<T, N>;
  V g[M];
  for (int m = 0; m < M; ++m) g[m] = Convert<S, T, N>::load(grad + m * N);
  const T *w0 = s.weight[0] + t, *w1 = s.weight[1] + t, *w2 = s.weight[2] + t, *w3 = s.weight[3] + t;
  const int32_t* pixel = s.pixel + t;
  T* dots = s.dots + 4 * t;
  const int64_t step = kChannels > 0 ? kChannels : channels;
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    T* upper = grad_plane + pixel[k] * step;
    T* lower = upper + row;
    const auto add_to = [&](T* to, T weight) __attribute__((always_inline)) {
      for (int m = 0; m < M; ++m) store(to + m * N, load<V>(to + m * N) + g[m] * weight);
    };
    add_to(upper, w0[k]);
    add_to(upper + step, w1[k]);
    add_to(lower, w2[k]);
    add_to(lower + step, w3[k]);
  };
  const auto product = [&](int64_t k, V* to) __attribute__((always_inline)) {
    const T* upper = plane + pixel[k] * step;
    const T* lower = upper + row;
    const T* corners[4] = {upper, upper + step, lower, lower + step};
    for (int i = 0; i < 4; ++i) {
      to[i] = load<V>(corners[i]) * g[0];
      for (int m = 1; m < M; ++m) to[i] += load<V>(corners[i] + m * N) * g[m];
    }
  };
  const int64_t count = kPoints > 0 ? kPoints : points;
  // as many points at a time as have their sums in one vector
  constexpr int kAtOnce = N >= 4 ? N / 4 : 1;
  int64_t k = 0;
  if constexpr (kDots && kAtOnce > 1) {
    for (; k + kAtOnce <= count; k += kAtOnce) {
      V products[N];
      for (int j = 0; j < kAtOnce; ++j) product(k + j, products + 4 * j);
      const V sums = sum_lanes_n<T, N>(products);
      store(dots + 4 * k, kFirst ? sums : load<V>(dots + 4 * k) + sums);
      if constexpr (kInput)
        for (int j = 0; j < kAtOnce; ++j) add(k + j);
    }
  }
  for (; k < count; ++k) {
    if constexpr (kDots) {
      V products[4];
      T sums[4];
      product(k, products);
      sum_lanes_4<T, N>(sums, products[0], products[1], products[2], products[3]);
      for (int i = 0; i < 4; ++i) dots[4 * k + i] = kFirst ? sums[i] : dots[4 * k + i] + sums[i];
    }
    if constexpr (kInput) add(k);
  }
}

// As scatter_channels for all `width` channels, in vectors as wide as possible.
template <typename S, typename T, int N, bool kInput, bool kDots, bool kFirst>
INTERNIMAGE_INLINE void scatter_unit(const Points<T>& s, int64_t t, int64_t points, const T* plane, T* grad_plane,
                                     int64_t row, int64_t channels, int64_t width, const S* grad) {
  constexpr int M = N == kLanes<T> && N < 16 ? 16 / N : 1;
  if (width >= M * N) {
    scatter_channels<S, T, N, M, kInput, kDots, kFirst, 0, 0>(s, t, points, plane, grad_plane, row, channels, grad);
    int64_t c = M * N;
    for (; c + M * N <= width; c += M * N)
      scatter_channels<S, T, N, M, kInput, kDots, false, 0, 0>(s, t, points, plane + c, grad_plane + c, row, channels,
                                                               grad + c);
    if constexpr (N > 1) {
      if (c < width)
        scatter_unit<S, T, N / 2, kInput, kDots, false>(s, t, points, plane + c, grad_plane + c, row, channels,
                                                        width - c, grad + c);
    }
  } else if constexpr (N > 1) {
    scatter_unit<S, T, N / 2, kInput, kDots, kFirst>(s, t, points, plane, grad_plane, row, channels, width, grad);
  }
}

// For one point with a gradient of its own, `width` channels in vectors as wide as possible: adds to the gradients of
// its corners, and adds to its four dot products.
template <typename S, typename T, int N, bool kInput, bool kDots>
INTERNIMAGE_INLINE void scatter_point(const T (&weight)[4], const T* plane, T* grad_plane, int64_t row,
                                      int64_t channels, int64_t width, const S* grad, T (&dots)[4]) {
  using V = Vector<T, N>;
  const int64_t corners[4] = {0, channels, row, row + channels};
  if (width >= N) {
    V sum[4] = {};
    int64_t c = 0;
    for (; c + N <= width; c += N) {
      const V g = Convert<S, T, N>::load(grad + c);
      for (int i = 0; i < 4; ++i) {
        if constexpr (kDots) sum[i] += load<V>(plane + corners[i] + c) * g;
        if constexpr (kInput) {
          T* to = grad_plane + corners[i] + c;
          store(to, load<V>(to) + g * weight[i]);
        }
      }
    }
    if constexpr (kDots) {
      T sums[4];
      sum_lanes_4<T, N>(sums, sum[0], sum[1], sum[2], sum[3]);
      for (int i = 0; i < 4; ++i) dots[i] += sums[i];
    }
    plane += c;
    grad_plane += c;
    grad += c;
    width -= c;
  }
  if constexpr (N > 1) {
    if (width > 0)
      scatter_point<S, T, N / 2, kInput, kDots>(weight, plane, grad_plane, row, channels, width, grad, dots);
  }
}

// As above for the points of the unit that begin at t; `step` elements from one point's gradient to the next's.
template <typename S, typename T, bool kInput, bool kDots>
INTERNIMAGE_INLINE void scatter_points(const Points<T>& s, int64_t t, int64_t points, const T* plane, T* grad_plane,
                                       int64_t row, int64_t channels, const S* grad, int64_t step) {
  for (int64_t k = t; k < t + points; ++k, grad += step) {
    const int64_t at = s.pixel[k] * channels;
    const T weight[4] = {s.weight[0][k], s.weight[1][k], s.weight[2][k], s.weight[3][k]};
    T dots[4] = {};
    scatter_point<S, T, kLanes<T>, kInput, kDots>(weight, plane + at, grad_plane + at, row, channels, channels, grad,
                                                  dots);
    if constexpr (kDots) __builtin_memcpy(s.dots + 4 * k, dots, sizeof(dots));
  }
}

// Dot products -> s.grad_offset() and s.grad_factor().
template <typename T, bool kYFirst>
INTERNIMAGE_NOINLINE void gradients_from_dots(const Problem& p, const Points<T>& s, int64_t total) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  const T scale = (T)p.offset_scale;
  for (int64_t t = 0; t < total; t += N) {
    V d00, d01, d10, d11;
    load_fours<T, N>(s.dots + 4 * t, d00, d01, d10, d11);
    const V right = load<V>(s.right + t), below = load<V>(s.below + t), scaled = load<V>(s.inside_factor + t) * scale;
    const V along_upper = d01 - d00, along_lower = d11 - d10;  // along x
    const V upper = d00 + right * along_upper, lower = d10 + right * along_lower;
    const V along_y = lower - upper;
    const V grad_x = scaled * (along_upper + below * (along_lower - along_upper)), grad_y = scaled * along_y;
    store_pairs<T, N>(s.grad_offset() + 2 * t, kYFirst ? grad_y : grad_x, kYFirst ? grad_x : grad_y);
    store(s.grad_factor() + t, upper + below * along_y);
  }
}

// The backward pass as a sequence of tasks, one for each block of each image. No two tasks write to the same address,
// so no atomics are needed, and no sum depends on how tasks are distributed over threads, or groups over blocks.
// kColumns: there is a gradient for each point's sample, as in `Forward`; else one for their sum.
template <typename S, typename T, bool kColumns = false>
struct Backward {
  const Problem& p;
  Blocks blocks;
  StripShape shape;

  // Makes at least `wanted_tasks` tasks if there are enough groups.
  Backward(const Problem& problem, int64_t wanted_tasks)
      : p(problem), blocks(problem, block_size(problem, wanted_tasks)), shape(problem, blocks.size) {}

  static int64_t block_size(const Problem& p, int64_t wanted_tasks) {
    const int64_t cached = groups_in_cache<T>(p, 2);
    const int64_t wanted_blocks = (wanted_tasks + p.batch - 1) / p.batch;
    const int64_t limit = wanted_blocks < p.groups ? p.groups / wanted_blocks : 1;
    return cached < limit ? cached : limit;
  }

  int64_t tasks() const { return p.batch * blocks.count; }
  int64_t scratch_bytes() const { return Points<T>::bytes(shape) + 2 * Plane<T>::bytes(p, blocks.size); }

  template <bool kInput, bool kDots>
  void run_tasks(const S* grad_output, const S* input, const S* offset, const S* mask, S* grad_input, S* grad_offset,
                 S* grad_mask, void* scratch, int64_t begin, int64_t end) const {
    const Points<T> s(scratch, shape);
    char* planes = (char*)scratch + Points<T>::bytes(shape);
    InputPlane<S, T> plane(p, planes);
    GradientPlane<S, T> grad_plane(p, planes + Plane<T>::bytes(p, blocks.size));
    const int64_t image_size = p.height * p.width * p.channels, row = plane.pitch * p.group_channels;
    int64_t grid_groups = 0;  // that the grid is filled in for
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks.count, first_group = blocks.begin(task % blocks.count);
      const int64_t group_count = blocks.groups(task % blocks.count),
                    image = n * image_size + first_group * p.group_channels;
      if (group_count != grid_groups) fill_grid(p, shape, s, group_count);
      grid_groups = group_count;
      if (kDots) plane.reset(input + image, group_count);
      if (kInput) grad_plane.reset(group_count);
      for (int64_t index = 0; index < shape.count(); ++index) {
        const Strip strip(p, shape, index, n);
        load_points(p, strip, s, offset, mask, first_group, group_count);
        const RowRange rows = locate<T, true>(p, strip, s, strip.pixels * group_count * p.points, plane.pitch);
        if (kDots) plane.ensure(rows);
        int64_t t = 0;
        for (int64_t i = 0; i < strip.pixels; ++i) {
          const S* grad = grad_output + (strip.first_pixel + i) * p.channels * (kColumns ? p.points : 1) +
                          first_group * p.group_channels;
          for (int64_t g = 0; g < group_count; ++g, t += p.points, grad += p.group_channels) {
            const T* from = plane.data + g * plane.size;
            T* to = grad_plane.data + g * plane.size;
            if constexpr (kColumns) {
              scatter_points<S, T, kInput, kDots>(s, t, p.points, from, to, row, p.group_channels, grad, p.channels);
            } else if (kIsSpecialized<S> && p.group_channels == 16 && p.points == 9) {
              constexpr int N = kLanes<T> < 16 ? kLanes<T> : 16;
              scatter_channels<S, T, N, 16 / N, kInput, kDots, true, 9, 16>(s, t, 9, from, to, row, 16, grad);
            } else {
              scatter_unit<S, T, kLanes<T>, kInput, kDots, true>(s, t, p.points, from, to, row, p.group_channels,
                                                                 p.group_channels, grad);
            }
          }
        }
        if (kDots) write_points(s, strip, grad_offset, grad_mask, first_group, group_count);
      }
      if (kInput) grad_plane.write(grad_input + image, p.channels, group_count);
    }
  }

  INTERNIMAGE_NOINLINE void write_points(const Points<T>& s, const Strip& strip, S* grad_offset, S* grad_mask,
                                         int64_t first_group, int64_t group_count) const {
    const int64_t units = strip.pixels * group_count;
    if (p.y_first)
      gradients_from_dots<T, true>(p, s, units * p.points);
    else
      gradients_from_dots<T, false>(p, s, units * p.points);
    const T* grad = s.grad_factor();
    if (p.softmax) {
      softmax_backward(s.factor, s.grad_factor(), s.softmax_scratch(), s.grad_logits(), units, p.points);
      grad = s.grad_logits();
    }
    write_units(grad_offset, s.grad_offset(), strip, first_group, group_count, 2 * p.points, p.grad_offset);
    write_units(grad_mask, grad, strip, first_group, group_count, p.points, p.grad_mask);
  }

  // Writes `count` elements of each of the strip's units.
  static INTERNIMAGE_INLINE void write_units(S* to, const T* from, const Strip& strip, int64_t first_group,
                                             int64_t group_count, int64_t count, UnitStrides stride) {
    const bool together = stride.group == count;  // the units of a pixel
    const int64_t runs = together ? 1 : group_count, run = together ? group_count * count : count;
    to += strip.first_pixel * stride.pixel + first_group * stride.group;
    for (int64_t i = 0; i < strip.pixels; ++i, to += stride.pixel)
      for (int64_t g = 0; g < runs; ++g, from += run) copy_narrowed(to + g * stride.group, from, run);
  }

  void run(const S* grad_output, const S* input, const S* offset, const S* mask, S* grad_input, S* grad_offset,
           S* grad_mask, void* scratch, int64_t begin, int64_t end) const {
    if (grad_input && grad_offset)
      run_tasks<true, true>(grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, scratch, begin, end);
    else if (grad_input)
      run_tasks<true, false>(grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, scratch, begin, end);
    else
      run_tasks<false, true>(grad_output, input, offset, mask, grad_input, grad_offset, grad_mask, scratch, begin, end);
  }
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
