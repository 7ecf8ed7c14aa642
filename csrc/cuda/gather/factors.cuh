// SPDX-License-Identifier: MIT
// The factors of a unit's points: its mask, or the softmax of it.
#pragma once

#include "../storage.cuh"
#include "../types.h"

namespace internimage {
namespace cuda {

// kPoints factors, in registers.
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
struct Factors<S, 0> {  // any number of factors: recomputed at each use
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

}  // namespace cuda
}  // namespace internimage
