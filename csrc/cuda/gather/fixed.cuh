// SPDX-License-Identifier: MIT
// The gradient of the input with the same bits each time, a variant: sums of 64-bit integers, which do not depend on
// the order of the atomic additions. For float and the half types.
//
// fixed_range_kernel finds the largest |grad_output| and |mask| (G, and F: 1 with the softmax). With the powers of two
// g <= G and f <= F, a product share * factor * grad_output is less than 2^kFixedProduct * g * f, and the host chooses
// `bits` such that no sum of an image's products overflows when each is rounded to a multiple of g * f * 2^-bits
// (select.h). fixed_sum_kernel sums these multiples, fixed_round_kernel makes floats of them.
//
// Error: a product in float32 has three roundings, each relative and at most 2^-24, as in the default kernel; its
// rounding to a multiple adds at most g * f * 2^-(bits + 1), and the final one 2^-24 of the sum. In an image of 56 x 56
// pixels with 9 points, bits is 43.
//
// With values that are not finite, fixed_slow_kernel does all the work: each kernel reads the range and returns if it
// is not its turn, so that the host need not wait for the range.
#pragma once

#include <cstdint>

#include "../storage.cuh"
#include "../types.h"
#include "arguments.h"
#include "deterministic.cuh"
#include "factors.cuh"
#include "grid.cuh"
#include "points.cuh"
#include "units.cuh"

namespace internimage {
namespace cuda {

// The largest of some elements of an array: bits of its absolute value, which are in the order of the values, with
// infinity and NaN as the largest.
template <typename S>
__device__ __forceinline__ uint32_t largest_magnitude(const S* values, uint64_t first, uint64_t end, uint64_t step) {
  uint32_t largest = 0;
  for (uint64_t i = first; i < end; i += step) {
    const uint32_t bits = __float_as_uint(Storage<S>::widen(__ldg(values + i))) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// All threads of the warp must call it.
__device__ __forceinline__ void raise_to(uint32_t* to, uint32_t value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) atomicMax(to, value);
}

// range[0] and range[1], which are zero before: the bits of the largest |grad_output| and |mask|.
template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads)
    fixed_range_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output, uint64_t grads,
                       const S* __restrict__ mask, uint64_t masks, uint32_t* __restrict__ range) {
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  raise_to(range, largest_magnitude(grad_output, thread, grads, a.threads));
  raise_to(range + 1, largest_magnitude(mask, thread, masks, a.threads));
}

__device__ __forceinline__ float power_of_two(int32_t exponent) {  // -126 to 127
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// The range of the products: whether all values are finite, and log2 of g and f. These are limited so that both powers
// and their inverses are normal; a value above the limit, in [2^127, 2^128), is less than 4 times it.
struct FixedRange {
  bool is_finite;
  int32_t grad, factor;

  __device__ __forceinline__ FixedRange(const uint32_t* range, bool softmax) {
    const uint32_t grad_bits = __ldg(range), mask_bits = __ldg(range + 1);
    is_finite = grad_bits < 0x7f800000u && mask_bits < 0x7f800000u;
    grad = exponent(grad_bits);
    factor = softmax ? 0 : exponent(mask_bits);
  }

 private:
  static __device__ __forceinline__ int32_t exponent(uint32_t bits) {
    const int32_t biased = static_cast<int32_t>(bits >> 23);
    return (biased < 1 ? 1 : biased > 253 ? 253 : biased) - 127;
  }
};

// Thread: a unit and some of its channels. If kChannels > 1, they are kChannels apart, and so many adjacent threads
// have adjacent ones: what they add at a time is adjacent.
template <typename S, int kChannels, typename Index>
__global__ void __launch_bounds__(kThreads, 2)
    fixed_sum_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                     const S* __restrict__ offset, const S* __restrict__ mask, const uint32_t* __restrict__ range,
                     int32_t bits, uint64_t* __restrict__ sums) {
  using T = Compute<S>;
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  const FixedRange fixed(range, a.softmax);
  if (thread >= a.threads || !fixed.is_finite) return;
  const Index index = quotient(thread, a.slices);
  const uint32_t part = static_cast<uint32_t>(thread - index * a.slices.divisor);
  const uint32_t channel = part / kChannels * (kChannels * kChannels) + part % kChannels;
  const Unit<T, Index> unit(a, index);
  const uint64_t first_point = static_cast<uint64_t>(index) * a.points;
  offset += 2 * first_point;
  grad_output += static_cast<uint64_t>(index) * a.group_channels + channel;
  sums += unit.image * a.image_elements + (unit.group * a.group_channels + channel);
  T grad[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    grad[i] = Storage<S>::widen(__ldg(grad_output + i * kChannels)) * power_of_two(-fixed.grad);
  const T factor_scale = power_of_two(-fixed.factor), scale = power_of_two(bits);
  const Factors<S, 0> factors(mask + first_point, a.points, a.softmax);
  for_each_point<0>(a, [&](int k, T grid_x, T grid_y) {
    const Cell<T, Index> cell = locate<S>(a, unit, offset, k, grid_x, grid_y);
    if (!cell.inside) return;
    const T factor = factors.at(k) * factor_scale;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (!cell.has(corner)) continue;
      const T weight = factor * cell.weight(corner);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const long long product = __float2ll_rn(weight * grad[i] * scale);
        atomicAdd(reinterpret_cast<unsigned long long*>(sums + cell.at(corner) + i * kChannels),
                  static_cast<unsigned long long>(product));
      }
    }
  });
}

// grad_input is filled with zeros.
template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads, 2)
    fixed_slow_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ grad_output,
                      const S* __restrict__ offset, const S* __restrict__ mask, const uint32_t* __restrict__ range,
                      Compute<S>* __restrict__ grad_input) {
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (FixedRange(range, a.softmax).is_finite) return;
  sum_in_order(a, thread, grad_output, offset, mask, grad_input);
}

template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads)
    fixed_round_kernel(const Arguments<Compute<S>, Index> a, const uint64_t* __restrict__ sums,
                       const uint32_t* __restrict__ range, int32_t bits, Compute<S>* __restrict__ grad_input) {
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  const FixedRange fixed(range, a.softmax);
  if (thread >= a.threads || !fixed.is_finite) return;
  const long long sum = static_cast<long long>(__ldg(reinterpret_cast<const unsigned long long*>(sums) + thread));
  grad_input[thread] = ldexpf(__ll2float_rn(sum), fixed.grad + fixed.factor - bits);
}

}  // namespace cuda
}  // namespace internimage
