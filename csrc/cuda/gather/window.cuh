// SPDX-License-Identifier: MIT
// Backward on tensor cores, a variant for half types, 16 channels a group and a dense 3x3 kernel of stride 1.
//
// A warp processes a tile of 8 x 4 output pixels of one group, a unit each lane, and the window of 16 x 10 pixels of
// the input around the tile: most sampling points have all corners there. Two matrix products replace the loads and the
// atomic additions of each corner. With G[unit][channel] the gradient of the output and V[pixel][channel] the window:
//
//   dots = V G^T             [pixel][unit]; a lane reads those of its points' corners, and has the gradients of offset
//                            and mask from them, as in backward.cuh
//   weights                  [pixel][unit]; a lane adds share * factor of its points' corners in its own column
//   grad_window = weights G  [pixel][channel], added to grad_input with one atomic addition for 4 channels of a pixel
//
// dots, the gradients of offset and mask, and weights are in the same shared memory, one after the other. A lane
// accesses its own column without care for conflicts (`word_of`), and matrix fragments go there and come from there 16
// bytes at a time.
//
// Precision: a weight is the sum of two values of S, `high` and `low`. For __half, these are 22 bits if no lower bit is
// below 2^-24; so that this does not matter, weights are scaled by a power of two until the warp's largest sum of
// |factors| is near 2^14. For __nv_bfloat16, they are 16 bits, and the sum of a unit's corners in one pixel is rounded
// at most 9 times, by 2^-17: little beside the 2^-9 of the result. Products are exact, sums are in float32.
//
// A dense product also multiplies values that do not belong together: a weight of zero with a gradient that is infinite
// gives NaN. So these tiles take the way of all points outside of the window, one by one as in backward.cuh: those with
// a grad_output that is not finite, or a mask, wherever its point is. Values of the input that are not finite reach
// only the dots of their own pixel. Before compute capability 8.0, all points take that way: the kernel is right there,
// but slower than backward.cuh's.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../mma.cuh"
#include "../storage.cuh"
#include "../types.h"
#include "arguments.h"
#include "backward.cuh"
#include "factors.cuh"
#include "gradients.cuh"
#include "grid.cuh"
#include "points.cuh"
#include "units.cuh"

namespace internimage {
namespace cuda {

constexpr int kWindowWidth = 16, kWindowHeight = 10;
constexpr int kWindowLeft = 4, kWindowTop = 3;  // pixels between its edge and the center of the tile's first unit
constexpr int kWindowLine = kWindowWidth * kWindowThreads, kWindowWords = kWindowHeight * kWindowLine;

// Units are numbered such that 2n and 2n + 1 are two columns apart, and 2n and 2n + 32 adjacent ones (see word_of): the
// bits of a unit's number are bit 0 of its column in the tile, bits 0 and 1 of its row, bits 2 and 1 of its column.
__device__ __forceinline__ uint32_t column_of_unit(uint32_t unit) {
  return unit >> 4 | (unit & 1) << 1 | (unit & 2) << 1;
}
__device__ __forceinline__ uint32_t row_of_unit(uint32_t unit) { return (unit >> 3 & 1) | (unit >> 1 & 2); }

// Where the value of a pixel of the window and a unit is, in words: lines of 8 pairs of adjacent pixels, a pair has 32
// units, and a unit the two pixels. So the four words of two units and a pair are a part of a matrix as it is in
// registers. Bits 1 and 2 of the column change the place in a pair: lanes that access four words each, of several pairs
// and units at once, use all banks; lanes that each access a word of their own unit do so too, if they all sample at
// the same place relative to their unit.
__device__ __forceinline__ uint32_t word_of(uint32_t line, uint32_t column, uint32_t unit) {
  const uint32_t in_line = (column << 5 & 0x1c0) ^ (column << 3 & 0x10) ^ (column << 1 & 8) ^ (column & 1) ^ unit << 1;
  return line * kWindowLine + in_line;
}

// Whether both halves of a word are finite.
template <typename S>
struct Exponent;
template <>
struct Exponent<__half> {
  static constexpr uint32_t kLowest = 0x04000400u;
};
template <>
struct Exponent<__nv_bfloat16> {
  static constexpr uint32_t kLowest = 0x00800080u;
};
template <typename S>
__device__ __forceinline__ bool are_finite(const uint2& w) {  // else the exponent's overflow reaches the sign's bit
  return ((((w.x & 0x7fff7fffu) + Exponent<S>::kLowest) | ((w.y & 0x7fff7fffu) + Exponent<S>::kLowest)) &
          0x80008000u) == 0;
}

// The power of two that the weights are multiplied with, and its inverse, from a bound of their magnitude.
template <typename S>
struct WeightScale {
  float scale, inverse;

  __device__ __forceinline__ explicit WeightScale(float bound) : scale(1), inverse(1) {
    if constexpr (std::is_same<S, __half>::value) {
      const uint32_t exponent = __float_as_uint(bound) >> 23, limited = exponent < 15 ? 15 : exponent;
      scale = __uint_as_float((268 - limited) << 23);  // bound * scale is in [2^14, 2^15)
      inverse = __uint_as_float((limited - 14) << 23);
    }
  }
};

// word, two halves whose sum is a weight, += value
template <typename S>
__device__ __forceinline__ void add_to_weight(uint32_t& word, float value) {
  float halves[2];
  Storage<S>::template unpack<2>(&word, halves);
  const float sum = halves[0] + halves[1] + value;
  halves[0] = Storage<S>::widen(Storage<S>::narrow(sum));
  halves[1] = sum - halves[0];
  Storage<S>::template pack<2>(halves, &word);
}

// grad_input is filled with zeros and of the compute type. It may be null, or both grad_offset and grad_mask.
template <typename S, int kPoints, typename Index>
__global__ void __launch_bounds__(kWindowThreads)
    window_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output, const S* __restrict__ input,
                  const S* __restrict__ offset, const S* __restrict__ mask, Compute<S>* __restrict__ grad_input,
                  S* __restrict__ grad_offset, S* __restrict__ grad_mask) {
  constexpr uint32_t kAll = 0xffffffffu;
  __shared__ uint4 memory[kWindowWords / 4];
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
  const bool want_points = grad_offset != nullptr, want_input = grad_input != nullptr;

  // the tile, and this lane's unit: one of the tile's last row or column if its own is beyond the edge
  const Index block = static_cast<Index>(blockIdx.x);
  const Index tile = quotient(block, a.groups), group = block - tile * a.groups.divisor;
  const Index row_of_tiles = quotient(tile, a.tiles_across), image = quotient(row_of_tiles, a.tiles_down);
  const int32_t left = static_cast<int32_t>(tile - row_of_tiles * a.tiles_across.divisor) * kWindowTileWidth;
  const int32_t top = static_cast<int32_t>(row_of_tiles - image * a.tiles_down.divisor) * kWindowTileHeight;
  const auto column_of = [&](int32_t x) { return left + x < a.out_columns ? left + x : a.out_columns - 1; };
  const auto row_of = [&](int32_t y) { return top + y < a.out_rows ? top + y : a.out_rows - 1; };
  const auto unit_of = [&](int32_t x, int32_t y) {
    return ((image * a.out_rows + row_of(y)) * a.out_columns + column_of(x)) * a.groups.divisor + group;
  };
  const auto grad_of = [&](uint32_t number) {  // of a unit of the tile
    return grad_output + static_cast<uint64_t>(unit_of(column_of_unit(number), row_of_unit(number))) * kWindowChannels;
  };
  const uint32_t lane = threadIdx.x;
  const int32_t own_x = column_of_unit(lane), own_y = row_of_unit(lane);
  const bool is_active = left + own_x < a.out_columns && top + own_y < a.out_rows;
  const Index index = unit_of(own_x, own_y);
  const Unit<float, Index> unit(a, group, image, column_of(own_x), row_of(own_y));
  const uint64_t first_point = static_cast<uint64_t>(index) * kPoints;
  const Factors<S, kPoints> factors(mask + first_point, kPoints, a.softmax);
  offset += 2 * first_point;
  const uint64_t at_image = image * a.image_elements + group * kWindowChannels;
  const S* own_grad = grad_output + static_cast<uint64_t>(index) * kWindowChannels;

  // place of this lane in the fragments of matrices (mma.cuh)
  const uint32_t row = lane / 4, pair = lane % 4;

  // G for the dots: rows `row` and row + 8 of product n are the units 16 * n + 2 * row and the next one, and a pair of
  // k is a pair of channels, so that a lane has adjacent channels
  uint32_t grads[2][4];
  bool is_finite = true;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const uint32_t of = 16 * n + 2 * row + next;
      const uint2 four = __ldg(reinterpret_cast<const uint2*>(grad_of(of)) + pair);
      is_finite = is_finite && are_finite<S>(four);
      grads[n][next] = four.x;
      grads[n][next + 2] = four.y;
    }
  float bound = 0;  // of this unit's weights
#pragma unroll
  for (int k = 0; k < kPoints; ++k) bound += fabsf(factors.at(k));
  is_finite = is_finite && bound < 1e38f;  // false for NaN
  const bool is_dense = INTERNIMAGE_MMA && !__any_sync(kAll, !is_finite);

  const int32_t window_x = left + a.first_x - kWindowLeft, window_y = top + a.first_y - kWindowTop;
  const auto has_column = [&](int32_t x) { return static_cast<uint32_t>(window_x + x) < a.width; };  // nor negative
  const auto has_line = [&](int32_t line) { return static_cast<uint32_t>(window_y + line) < a.height; };
  // of the window's pixel (0, 0), which may be outside of the image
  const int64_t at_window = static_cast<int64_t>(at_image) +
                            (static_cast<int64_t>(window_y) * a.width + window_x) * static_cast<int64_t>(a.channels);

  if (want_points && is_dense) {
    // V: column `row` of a product is that pixel of 8; the result has two units and two adjacent pixels of a lane
    const S* from = materialize(input + (at_window + static_cast<int64_t>(row) * a.channels + 4 * pair));
    const Index half_line = 8 * a.channels;
    const bool has[2] = {has_column(row), has_column(row + 8)};
    uint32_t to[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) to[half] = word_of(0, 8 * half + 2 * pair, 2 * row);
#pragma unroll
    for (int line = 0; line < kWindowHeight; ++line) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint2 four = make_uint2(0, 0);
        if (has[half] && has_line(line)) four = __ldg(reinterpret_cast<const uint2*>(from + half * half_line));
        const uint32_t pixel[2] = {four.x, four.y};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float dots[4] = {};
          mma<S>(dots, grads[n], pixel);
          memory[(line * kWindowLine + to[half] + 32 * n) / 4] = make_uint4(
              __float_as_uint(dots[0]), __float_as_uint(dots[1]), __float_as_uint(dots[2]), __float_as_uint(dots[3]));
        }
      }
      from += a.row_elements;
    }
    __syncwarp();
  }

  Cell<float, Index> cells[kPoints];
  uint32_t left_word[kPoints], right_word[kPoints];  // of the upper corners; any if the point is not here
  uint32_t here = 0, others = 0;  // points whose corners are in the window, and those that take the other way
  [[maybe_unused]] float grad_factors[kPoints];
  [[maybe_unused]] uint32_t shifts[kPoints];  // the gradients of the offsets, two values each
  for_each_point<kPoints>(a, [&](int k, float grid_x, float grid_y) {
    const Cell<float, Index> cell = cells[k] = locate<S>(a, unit, offset, k, grid_x, grid_y);
    const uint32_t x = static_cast<uint32_t>(cell.column - window_x), y = static_cast<uint32_t>(cell.row - window_y);
    const bool is_here = is_dense && cell.inside && is_active && x < kWindowWidth - 1 && y < kWindowHeight - 1;
    left_word[k] = word_of(is_here ? y : 0, is_here ? x : 0, lane);
    right_word[k] = word_of(is_here ? y : 0, is_here ? x + 1 : 1, lane);
    here |= is_here ? 1u << k : 0u;
    others |= cell.inside && is_active && !is_here ? 1u << k : 0u;
    if (!want_points) return;
    const uint32_t* corners[4] = {words + left_word[k], words + right_word[k], words + left_word[k] + kWindowLine,
                                  words + right_word[k] + kWindowLine};
    float dots[4], sums[3], shift[2];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) dots[corner] = __uint_as_float(*corners[corner]);
    differentiate(cell, dots, sums);
    grad_factors[k] = cell.inside ? sums[2] : 0;  // of another point than those that are here: replaced below
    shift_gradient(a, cell, factors.at(k), sums, shift);
    store<S, 2>(reinterpret_cast<S*>(shifts + k), shift);
  });

  // The gradients of offset and mask go through shared memory, as those of a unit are adjacent: else each store of the
  // warp would write a word or less to each of 32 places.
  constexpr uint32_t kStride = kPoints | 1;  // of a unit, odd so that units are in different banks
  constexpr uint32_t kMasks = kWindowThreads * kStride, kIndices = 2 * kMasks, kNobody = 0xffffffffu;
  uint32_t* results = words + lane * kStride;
  if (want_points) {
    __syncwarp();  // all have read their dots
#pragma unroll
    for (int k = 0; k < kPoints; ++k) results[k] = shifts[k];
  }

  if (others != 0) {
    float grad[kWindowChannels];
    load<S, kWindowChannels>(own_grad, grad);
    const Factors<S, 0> any_factor(mask + first_point, kPoints, a.softmax);
    const S* own_image = input + at_image;
#pragma unroll 1
    for (uint32_t left_over = others; left_over != 0; left_over &= left_over - 1) {
      const int k = __ffs(static_cast<int>(left_over)) - 1, at_grid = kPoints == 8 && k >= 4 ? k + 1 : k;
      const Cell<float, Index> cell = locate<S>(a, unit, offset, k, a.grid_x[at_grid / 3], a.grid_y[at_grid % 3]);
      const float factor = any_factor.at(k);
      if (want_points) {
        float dots[4], sums[3], shift[2];
        dot_corners<S, kWindowChannels>(a, cell, own_image, own_grad, 1, grad, dots);
        differentiate(cell, dots, sums);
        shift_gradient(a, cell, factor, sums, shift);
        store<S, 2>(reinterpret_cast<S*>(results + k), shift);
#pragma unroll
        for (int i = 0; i < kPoints; ++i) grad_factors[i] = i == k ? sums[2] : grad_factors[i];
      }
      if (want_input) {
        add_to_corners(cell, factor, reinterpret_cast<const float (&)[kWindowChannels / 4][4]>(grad),
                       grad_input + at_image, 4);
      }
    }
  }

  if (want_points) {
    float mean = 0;
#pragma unroll
    for (int k = 0; k < kPoints; ++k) mean += factors.at(k) * grad_factors[k];
#pragma unroll
    for (int k = 0; k < kPoints; ++k)
      *reinterpret_cast<S*>(results + kMasks + k) =
          Storage<S>::narrow(mask_gradient(a.softmax, factors.at(k), grad_factors[k], mean));
    words[kIndices + lane] = is_active ? index : kNobody;
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < kPoints; ++i) {
      const uint32_t of = (i * kWindowThreads + lane) / kPoints, k = (i * kWindowThreads + lane) % kPoints;
      if (words[kIndices + of] == kNobody) continue;
      const uint64_t point = static_cast<uint64_t>(words[kIndices + of]) * kPoints + k;
      reinterpret_cast<uint32_t*>(grad_offset)[point] = words[of * kStride + k];
      grad_mask[point] = *reinterpret_cast<const S*>(words + kMasks + of * kStride + k);
    }
  }

  if (!want_input || !is_dense) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAll, bound, distance);
    bound = other > bound ? other : bound;
  }
  const WeightScale<S> weight_scale(bound);
  // G for the gradient: a pair of k is one unit twice, for the two parts of its weight; product n has every other
  // channel, so that a lane has four adjacent ones in the result
  uint32_t doubled[4][2][2];
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const uint32_t of = 8 * step + 2 * pair + next;
      const uint32_t two = __ldg(reinterpret_cast<const uint32_t*>(grad_of(of)) + row);
      doubled[step][0][next] = (two & 0xffffu) | two << 16;
      doubled[step][1][next] = two >> 16 | (two & 0xffff0000u);
    }
  __syncwarp();  // all have read the results
#pragma unroll
  for (int i = 0; i < kWindowWords / 4 / kWindowThreads; ++i)
    memory[i * kWindowThreads + lane] = make_uint4(0, 0, 0, 0);
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kPoints; ++k) {
    const float factor = here >> k & 1 ? factors.at(k) * weight_scale.scale : 0;
    uint32_t* corners[4] = {words + left_word[k], words + right_word[k], words + left_word[k] + kWindowLine,
                            words + right_word[k] + kWindowLine};
    uint32_t weights[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) weights[corner] = *corners[corner];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      add_to_weight<S>(weights[corner], factor * cells[k].weight(corner));
      *corners[corner] = weights[corner];
    }
  }
  __syncwarp();
  // weights: rows `row` and row + 8 are two adjacent pixels
  float* to = materialize(grad_input + (at_window + static_cast<int64_t>(2 * row) * a.channels + 4 * pair));
  const bool has[2] = {has_column(2 * row), has_column(2 * row + 1)};
  uint32_t from[4];
#pragma unroll
  for (int step = 0; step < 4; ++step) from[step] = word_of(0, 2 * row, 8 * step + 2 * pair);
#pragma unroll
  for (int line = 0; line < kWindowHeight; ++line) {
    float sums[2][4] = {};  // of channels 4 * pair and 4 * pair + 2, and of those after them
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 four = memory[(line * kWindowLine + from[step]) / 4];
      const uint32_t weights[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < 2; ++n) mma<S>(sums[n], weights, doubled[step][n]);
    }
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      float values[4] = {sums[0][2 * next], sums[1][2 * next], sums[0][2 * next + 1], sums[1][2 * next + 1]};
      const bool is_zero = values[0] == 0 && values[1] == 0 && values[2] == 0 && values[3] == 0;
      if (!has[next] || !has_line(line) || is_zero) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] *= weight_scale.inverse;
      atomic_add<float, 4>(to + next * a.channels, values);
    }
    to += a.row_elements;
  }
}

}  // namespace cuda
}  // namespace internimage
