// SPDX-License-Identifier: MIT
// The CUDA kernels of DCNv3, and which of them serves a problem.
//
// Free of torch, so that the tests can also compile this text for a CPU, with a stand-in for what CUDA provides
// (tests/cuda_host), and run it there. A *unit* below is one output pixel of one group: it has P sampling points.
//
// Forward: a thread takes a unit's channels, as many as 32 bytes hold (16 of a half type), and finds each sampling point
// once for all of them. A group of more channels is shared by neighbouring threads (`slices`).
// Backward: a thread takes 4 channels, for float atomics go to memory 4 at a time; the threads of a unit (`lanes`) are
// neighbours in a warp and add up what they know about offset and mask by shuffles.
//
// All values are widened to the compute type (float, or double for double) when they are loaded, and rounded once when
// they are stored. A corner outside the image is read from a row of zeros: no branch, and no infinity that a weight of
// zero would turn into NaN.
#pragma once

#include <cstdint>

#include "../common.h"
#include "storage.cuh"

namespace internimage {
namespace cuda {

constexpr int kThreads = 256;  // a block
constexpr int kForwardBytes = 32;  // of one pixel's channels, a thread
constexpr int kBackwardChannels = 4;

// ---- what every thread is told

// Division by a number that was known at launch: a multiplication and a shift, for dividends below 2^31.
template <typename Index>
struct Divider {
  Index divisor;
  uint32_t multiplier, shift;

  Divider() = default;
  explicit Divider(int64_t number) : divisor(static_cast<Index>(number)), multiplier(0), shift(0) {
    if constexpr (sizeof(Index) == 4) {
      while ((int64_t{1} << shift) < number) ++shift;
      multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - number)) / number + 1);
    }
  }
  __device__ __forceinline__ Index quotient(Index dividend) const {
    if constexpr (sizeof(Index) > 4) {
      return dividend / divisor;
    } else {
      return (__umulhi(dividend, multiplier) + dividend) >> shift;
    }
  }
};

// T: the compute type. Index: uint32_t where threads and the elements of an image are below 2^31, else uint64_t; the
// places of images, offsets and masks are always counted in 64 bits.
template <typename T, typename Index>
struct Arguments {
  Index threads;
  Divider<Index> slices;                         // forward: threads that share a unit
  uint32_t lane_bits, lanes, chunks;             // backward: threads that share a unit, and how often each has 4 channels
  Divider<Index> groups, out_width, out_height;
  Index channels, width, row;                    // row = width * channels
  uint64_t image;                                // elements of one
  uint32_t group_channels;
  int32_t points, kernel_h, kernel_w, dilation_h, dilation_w, centre_h, centre_w;
  int32_t stride_h, stride_w, first_y, first_x;  // centre of the kernel at output pixel (0, 0)
  int32_t out_rows, out_columns;
  T right_end, lower_end, last_column, last_row;
  T grid_x[3], grid_y[3];                        // of a 3x3 kernel
  T offset_scale;
  bool remove_center, softmax;

  Arguments(const Problem& p, int64_t slices_, int64_t lanes_, int64_t chunks_, int64_t threads_)
      : threads(static_cast<Index>(threads_)),
        slices(slices_),
        lane_bits(0),
        lanes(static_cast<uint32_t>(lanes_)),
        chunks(static_cast<uint32_t>(chunks_)),
        groups(p.groups),
        out_width(p.out_width),
        out_height(p.out_height),
        channels(static_cast<Index>(p.channels)),
        width(static_cast<Index>(p.width)),
        row(static_cast<Index>(p.width * p.channels)),
        image(static_cast<uint64_t>(p.height * p.width * p.channels)),
        group_channels(static_cast<uint32_t>(p.group_channels)),
        points(static_cast<int32_t>(p.points)),
        kernel_h(static_cast<int32_t>(p.kernel_h)),
        kernel_w(static_cast<int32_t>(p.kernel_w)),
        dilation_h(static_cast<int32_t>(p.dilation_h)),
        dilation_w(static_cast<int32_t>(p.dilation_w)),
        centre_h(static_cast<int32_t>(p.dilation_h * (p.kernel_h - 1) / 2)),
        centre_w(static_cast<int32_t>(p.dilation_w * (p.kernel_w - 1) / 2)),
        stride_h(static_cast<int32_t>(p.stride_h)),
        stride_w(static_cast<int32_t>(p.stride_w)),
        first_y(static_cast<int32_t>(centre_h - p.pad_h)),
        first_x(static_cast<int32_t>(centre_w - p.pad_w)),
        out_rows(static_cast<int32_t>(p.out_height)),
        out_columns(static_cast<int32_t>(p.out_width)),
        right_end(static_cast<T>(p.width)),
        lower_end(static_cast<T>(p.height)),
        last_column(static_cast<T>(p.width - 1)),
        last_row(static_cast<T>(p.height - 1)),
        offset_scale(static_cast<T>(p.offset_scale)),
        remove_center(p.remove_center),
        softmax(p.softmax) {
    while ((uint32_t{1} << lane_bits) < lanes) ++lane_bits;
    for (int i = 0; i < 3; ++i) {
      grid_x[i] = static_cast<T>(i * p.dilation_w - centre_w);
      grid_y[i] = static_cast<T>(i * p.dilation_h - centre_h);
    }
  }
};

// ---- sampling points

// Calls body(k, grid_x, grid_y) for the points of the kernel, x-major. kPoints: 9 and 8 are the 3x3 kernel with and
// without its centre, unrolled; 0 is any kernel.
template <int kPoints, typename T, typename Index, typename Body>
__device__ __forceinline__ void for_each_point(const Arguments<T, Index>& a, Body body) {
  if constexpr (kPoints > 0) {
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      const int cell = kPoints == 8 && k >= 4 ? k + 1 : k;
      body(k, a.grid_x[cell / 3], a.grid_y[cell % 3]);
    }
  } else {
    int k = 0;
    for (int column = 0; column < a.kernel_w; ++column) {
      const T grid_x = static_cast<T>(column * a.dilation_w - a.centre_w);
      for (int line = 0; line < a.kernel_h; ++line) {
        if (a.remove_center && column == a.kernel_w / 2 && line == a.kernel_h / 2) continue;
        body(k++, grid_x, static_cast<T>(line * a.dilation_h - a.centre_h));
      }
    }
  }
}

// The factors of a unit's points: its mask, or the softmax of it.
template <typename S, int kPoints>
struct Factors {
  using T = Compute<S>;
  T values[kPoints];

  __device__ __forceinline__ Factors(const S* mask, int, bool softmax) {
#pragma unroll
    for (int k = 0; k < kPoints; ++k) values[k] = Storage<S>::widen(__ldg(mask + k));
    if (!softmax) return;
    T largest = values[0];
#pragma unroll
    for (int k = 1; k < kPoints; ++k) largest = values[k] > largest ? values[k] : largest;
    T sum = 0;
#pragma unroll
    for (int k = 0; k < kPoints; ++k) {
      values[k] = exponential(values[k] - largest);
      sum += values[k];
    }
    const T scale = inverse(sum);
#pragma unroll
    for (int k = 0; k < kPoints; ++k) values[k] *= scale;
  }
  __device__ __forceinline__ T at(int k) const { return values[k]; }
};

template <typename S>
struct Factors<S, 0> {  // of any number: computed again each time
  using T = Compute<S>;
  const S* mask;
  T largest, scale;
  bool softmax;

  __device__ __forceinline__ Factors(const S* mask_, int points, bool softmax_)
      : mask(mask_), largest(0), scale(1), softmax(softmax_) {
    if (!softmax) return;
    largest = Storage<S>::widen(__ldg(mask));
    for (int k = 1; k < points; ++k) {
      const T value = Storage<S>::widen(__ldg(mask + k));
      largest = value > largest ? value : largest;
    }
    T sum = 0;
    for (int k = 0; k < points; ++k) sum += exponential(Storage<S>::widen(__ldg(mask + k)) - largest);
    scale = inverse(sum);
  }
  __device__ __forceinline__ T at(int k) const {
    const T value = Storage<S>::widen(__ldg(mask + k));
    return softmax ? exponential(value - largest) * scale : value;
  }
};

// Where a unit is.
template <typename T, typename Index>
struct Unit {
  Index group, image;
  T x, y;  // the kernel's centre

  __device__ __forceinline__ Unit(const Arguments<T, Index>& a, Index unit) {
    const Index pixel = a.groups.quotient(unit);
    group = unit - pixel * a.groups.divisor;
    const Index line = a.out_width.quotient(pixel);
    x = static_cast<T>(static_cast<int32_t>(pixel - line * a.out_width.divisor) * a.stride_w + a.first_x);
    image = a.out_height.quotient(line);
    y = static_cast<T>(static_cast<int32_t>(line - image * a.out_height.divisor) * a.stride_h + a.first_y);
  }
};

struct alignas(kForwardBytes) Zeros {
  uint4 words[kForwardBytes / 16];
};
__device__ Zeros zero_row;  // nothing ever writes here

// The four pixels around a location. Corners are counted upper left, upper right, lower left, lower right.
template <typename T, typename Index>
struct Cell {
  bool inside, has_column[2], has_line[2];
  T right, below;  // shares of the right and of the lower pixels
  Index place, step_x, step_y;

  __device__ __forceinline__ Cell(const Arguments<T, Index>& a, T x, T y) : step_x(a.channels), step_y(a.row) {
    inside = x > -1 && x < a.right_end && y > -1 && y < a.lower_end;  // false for NaN
    x = inside ? x : T(0);
    y = inside ? y : T(0);
    const T x_floor = floor(x), y_floor = floor(y);
    right = x - x_floor;
    below = y - y_floor;
    has_column[0] = inside && x >= 0;
    has_column[1] = inside && x_floor < a.last_column;
    has_line[0] = y >= 0;
    has_line[1] = y_floor < a.last_row;
    // wraps around left of and above the image, where it is not used
    place = (static_cast<Index>(static_cast<int32_t>(y_floor)) * a.width +
             static_cast<Index>(static_cast<int32_t>(x_floor))) * a.channels;
  }
  __device__ __forceinline__ bool has(int corner) const { return has_column[corner % 2] && has_line[corner / 2]; }
  __device__ __forceinline__ Index at(int corner) const {
    return place + (corner % 2 ? step_x : 0) + (corner / 2 ? step_y : 0);
  }
  __device__ __forceinline__ T weight(int corner) const {
    return (corner % 2 ? right : 1 - right) * (corner / 2 ? below : 1 - below);
  }
  // A corner's values, of channels that begin at `image`.
  template <typename S, int N>
  __device__ __forceinline__ void read(int corner, const S* image, T (&values)[N]) const {
    load<S, N>(has(corner) ? image + at(corner) : reinterpret_cast<const S*>(&zero_row), values);
  }
};

// The location of point k: the same operations in the same order as the reference's.
template <typename S, typename T, typename Index>
__device__ __forceinline__ Cell<T, Index> locate(const Arguments<T, Index>& a, const Unit<T, Index>& unit,
                                                 const S* offset, int k, T grid_x, T grid_y) {
  T shift[2];
  load<S, 2>(offset + 2 * k, shift);
  return Cell<T, Index>(a, unit.x + (grid_x + shift[0]) * a.offset_scale, unit.y + (grid_y + shift[1]) * a.offset_scale);
}

// ---- forward

// The other 16 bytes of 32 that are aligned: an operation less than to keep two pointers.
template <typename S>
__device__ __forceinline__ const S* other_half(const S* pointer) {
  return reinterpret_cast<const S*>(reinterpret_cast<uintptr_t>(pointer) ^ 16);
}

// kSoftmax holds for kPoints > 0; the general kernel asks its arguments.
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
__global__ void __launch_bounds__(kThreads, kPoints > 0 ? 0 : 3)
    forward_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ input, const S* __restrict__ offset,
                   const S* __restrict__ mask, S* __restrict__ output) {
  using T = Compute<S>;
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  const Index index = a.slices.quotient(thread);
  const Unit<T, Index> unit(a, index);
  const Index slice = thread - index * a.slices.divisor;
  // A thread that has 32 bytes of a pixel loads them in two halves. Of eight neighbours, which are served at once, four
  // begin with their second half: all eight with the first would meet in one half of the cache's banks.
  constexpr int kHalves = kChannels * sizeof(S) / 16 > 0 ? kChannels * sizeof(S) / 16 : 1, kHalf = kChannels / kHalves;
  const uint32_t begin = kHalves == 2 && threadIdx.x % 8 >= 4 ? kHalf : 0;
  const S* image = input + unit.image * a.image + (unit.group * a.group_channels + slice * kChannels + begin);
  const S* zeros = reinterpret_cast<const S*>(&zero_row) + begin;
  const int points = kPoints > 0 ? kPoints : a.points;
  offset += static_cast<uint64_t>(index) * (2 * points);
  const Factors<S, kPoints> factors(mask + static_cast<uint64_t>(index) * points, points,
                                    kPoints > 0 ? kSoftmax : a.softmax);
  T sums[kHalves][kHalf] = {};
  for_each_point<kPoints>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S>(a, unit, offset, k, grid_x, grid_y);
    const T factor = cell.inside ? factors.at(k) : T(0);  // a NaN there does not count
    const T lines[2] = {factor * (1 - cell.below), factor * cell.below};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const S* from = cell.has(corner) ? image + cell.at(corner) : zeros;
      const T weight = (corner % 2 ? cell.right : 1 - cell.right) * lines[corner / 2];
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

// ---- backward

// The sums of N values over the threads of a unit, in all of them. All threads of the warp must come here.
template <int N, typename T, typename Index>
__device__ __forceinline__ void sum_over_lanes(const Arguments<T, Index>& a, T (&values)[N]) {
#pragma unroll 1
  for (uint32_t distance = a.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
  }
}

// This thread's part of <grad, corner> for the four corners.
template <typename S, int kChannels, typename T, typename Index>
__device__ __forceinline__ void dot_corners(const Arguments<T, Index>& a, const Cell<T, Index>& cell, const S* image,
                                            const S* grad_output, uint32_t chunks, T (&grad)[kChannels],
                                            T (&dots)[4]) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) dots[corner] = 0;
#pragma unroll 1
  for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
    const uint32_t channel = chunk * a.lanes * kChannels;
    if (chunks > 1) load<S, kChannels>(grad_output + channel, grad);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      T values[kChannels];
      cell.template read<S, kChannels>(corner, image + channel, values);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) dots[corner] += grad[i] * values[i];
    }
  }
}

template <typename T, typename Index>
__device__ __forceinline__ T interpolate(const Cell<T, Index>& cell, const T (&dots)[4]) {
  return (1 - cell.below) * ((1 - cell.right) * dots[0] + cell.right * dots[1]) +
         cell.below * ((1 - cell.right) * dots[2] + cell.right * dots[3]);
}

// With kPoints > 0 each thread has all its channels at once (one chunk).
// grad_input holds zeros, of the compute type; it or the pair of grad_offset and grad_mask may be null: not asked for.
template <typename S, int kChannels, int kPoints, typename Index>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                    const S* __restrict__ input, const S* __restrict__ offset, const S* __restrict__ mask,
                    Compute<S>* __restrict__ grad_input, S* __restrict__ grad_offset, S* __restrict__ grad_mask) {
  using T = Compute<S>;
  Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  // A thread too many stays for the shuffles of its warp: it does the last one's work and writes nothing.
  const bool real = thread < a.threads;
  thread = real ? thread : a.threads - 1;
  const Index index = thread >> a.lane_bits;
  const uint32_t lane = static_cast<uint32_t>(thread) & (a.lanes - 1);
  const Unit<T, Index> unit(a, index);
  const uint32_t first = lane * kChannels;
  const uint64_t at = unit.image * a.image + (unit.group * a.group_channels + first);
  const S* image = input + at;
  T* grad_image = grad_input + at;  // unless null
  grad_output += static_cast<uint64_t>(index) * a.group_channels + first;
  T grad[kChannels];
  load<S, kChannels>(grad_output, grad);
  const int points = kPoints > 0 ? kPoints : a.points;
  const uint64_t first_point = static_cast<uint64_t>(index) * points;
  offset += 2 * first_point;
  const Factors<S, kPoints> factors(mask + first_point, points, a.softmax);
  const bool writes = real && lane == 0;
  const uint32_t chunks = kPoints > 0 ? 1 : a.chunks;
  const bool want_points = grad_offset != nullptr;

  T mean = 0;  // sum of factor * its gradient, for the softmax
  [[maybe_unused]] T grad_factors[kPoints > 0 ? kPoints : 1];
  if constexpr (kPoints == 0) {  // too many to keep, so once more for the mean alone
    if (want_points && a.softmax) {
      T sums[1] = {0};
      for_each_point<kPoints>(a, [&](int k, T grid_x, T grid_y) {
        const Cell<T, Index> cell = locate<S>(a, unit, offset, k, grid_x, grid_y);
        T dots[4];
        dot_corners<S, kChannels>(a, cell, image, grad_output, chunks, grad, dots);
        sums[0] += cell.inside ? factors.at(k) * interpolate(cell, dots) : T(0);
      });
      sum_over_lanes(a, sums);
      mean = sums[0];
    }
  }

  for_each_point<kPoints>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S>(a, unit, offset, k, grid_x, grid_y);
    const T factor = cell.inside ? factors.at(k) : T(0);
    if (want_points) {
      T dots[4];
      dot_corners<S, kChannels>(a, cell, image, grad_output, chunks, grad, dots);
      T sums[3] = {(1 - cell.below) * (dots[1] - dots[0]) + cell.below * (dots[3] - dots[2]),   // along x
                   (1 - cell.right) * (dots[2] - dots[0]) + cell.right * (dots[3] - dots[1]),   // along y
                   interpolate(cell, dots)};
      sum_over_lanes(a, sums);
      const T grad_factor = cell.inside ? sums[2] : T(0);
      if (writes) {
        const T scale = factor * a.offset_scale;
        const T grad_shift[2] = {cell.inside ? sums[0] * scale : T(0), cell.inside ? sums[1] * scale : T(0)};
        store<S, 2>(grad_offset + 2 * (first_point + k), grad_shift);
      }
      if constexpr (kPoints > 0) {
        grad_factors[k] = grad_factor;
        mean += factors.at(k) * grad_factor;
      } else if (writes) {
        const T value = a.softmax ? factors.at(k) * (grad_factor - mean) : grad_factor;
        grad_mask[first_point + k] = Storage<S>::narrow(value);
      }
    }
    if (grad_input != nullptr && real && cell.inside) {
#pragma unroll 1
      for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t channel = chunk * a.lanes * kChannels;
        if (chunks > 1) load<S, kChannels>(grad_output + channel, grad);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (!cell.has(corner)) continue;
          const T weight = factor * cell.weight(corner);
          T values[kChannels];
#pragma unroll
          for (int i = 0; i < kChannels; ++i) values[i] = weight * grad[i];
          atomic_add<T, kChannels>(grad_image + channel + cell.at(corner), values);
        }
      }
    }
  });

  if constexpr (kPoints > 0) {
    if (want_points && writes) {
#pragma unroll
      for (int k = 0; k < kPoints; ++k) {
        const T value = a.softmax ? factors.at(k) * (grad_factors[k] - mean) : grad_factors[k];
        grad_mask[first_point + k] = Storage<S>::narrow(value);
      }
    }
  }
}

// grad_input alone, the same bits each time: one thread owns a channel of an image and goes through all that was sampled
// from it in a fixed order. Slow, as it has no more threads than the batch has channels.
template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads, 2)
    deterministic_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                         const S* __restrict__ offset, const S* __restrict__ mask, Compute<S>* __restrict__ grad_input) {
  using T = Compute<S>;
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  const Index image = thread / a.channels;
  const uint32_t channel = static_cast<uint32_t>(thread - image * a.channels);
  const uint32_t group = channel / a.group_channels;
  const uint64_t pixels = static_cast<uint64_t>(a.out_rows) * a.out_columns;
  T* grad_image = grad_input + image * a.image + channel;
  for (uint64_t pixel = image * pixels; pixel < (image + 1) * pixels; ++pixel) {
    const uint64_t index = pixel * a.groups.divisor + group;
    const Unit<T, Index> unit(a, static_cast<Index>(index));
    const S* shifts = offset + index * (2 * a.points);
    const Factors<S, 0> factors(mask + index * a.points, a.points, a.softmax);
    const T grad = Storage<S>::widen(__ldg(grad_output + pixel * a.channels + channel));
    for_each_point<0>(a, [&](int k, T grid_x, T grid_y) {
      const Cell<T, Index> cell = locate<S>(a, unit, shifts, k, grid_x, grid_y);
      const T factor = cell.inside ? factors.at(k) : T(0);
      T sums[4];  // all four are on their way before one is needed: they are never the same
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) sums[corner] = cell.has(corner) ? grad_image[cell.at(corner)] : T(0);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner)
        if (cell.has(corner)) grad_image[cell.at(corner)] = sums[corner] + factor * cell.weight(corner) * grad;
    });
  }
}

// ---- which kernel serves a problem
//
// `launch(kernel, threads, arguments...)` runs a kernel in blocks of kThreads. All pointers are aligned to
// kForwardBytes and the tensors are contiguous and not empty. `wide` asks for 64-bit indices where 32 would do, for tests.

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
  constexpr int kMost = kForwardBytes / sizeof(S);
  const auto run = p.group_channels % kMost == 0         ? forward_of_width<S, kMost, Launch>
                   : p.group_channels % (kMost / 2) == 0 ? forward_of_width<S, kMost / 2, Launch>
                                                         : forward_of_width<S, 1, Launch>;
  run(p, input, offset, mask, output, wide, launch);
}

template <typename S, int kChannels, typename Launch>
void backward_of_width(const Problem& p, const S* grad_output, const S* input, const S* offset, const S* mask,
                       Compute<S>* grad_input, S* grad_offset, S* grad_mask, bool wide, const Launch& launch) {
  int64_t lanes = 1;  // a power of two that leaves no thread of a unit without work
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
      kernel = p.remove_center ? backward_kernel<S, kChannels, 8, uint32_t> : backward_kernel<S, kChannels, 9, uint32_t>;
  }
  launch(kernel, threads, a, grad_output, input, offset, mask, grad_input, grad_offset, grad_mask);
}

// grad_input, or both of the others, may be null: not asked for.
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
