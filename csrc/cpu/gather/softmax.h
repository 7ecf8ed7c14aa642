// SPDX-License-Identifier: MIT
// The softmax over the points of each unit, and its gradient.
#pragma once

#include <cstdint>

#include "../simd/exponential.h"
#include "../simd/shuffle.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "points.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Sums over the points of each of four units: whole vectors, then what is left one by one.
template <typename T>
INTERNIMAGE_INLINE void sum_units(T* sum, const T* from, int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  if (points < N) {
    V lane{};
    for (int i = 0; i < N; ++i) lane[i] = (T)i;
    const auto in_unit = lane < broadcast<T, N>((T)points);
    const auto part = [&](int i) { return in_unit ? load<V>(from + i * points) : V{}; };
    sum_lanes_4<T, N>(sum, part(0), part(1), part(2), part(3));
  } else {
    V part[4];
    int64_t k = N;
    for (int i = 0; i < 4; ++i) part[i] = load<V>(from + i * points);
    for (; k + N <= points; k += N)
      for (int i = 0; i < 4; ++i) part[i] += load<V>(from + i * points + k);
    sum_lanes_4<T, N>(sum, part[0], part[1], part[2], part[3]);
    for (; k < points; ++k)
      for (int i = 0; i < 4; ++i) sum[i] += from[i * points + k];
  }
}

// to[k] = each(k) for the points of a unit, in whole vectors. What is written past the unit's points is overwritten by
// the next unit's, so units must be processed in order, and `each` must not read from `to`.
template <typename T, typename Each>
INTERNIMAGE_INLINE void map_unit(T* to, int64_t points, Each each) {
  for (int64_t k = 0; k < points; k += kLanes<T>) store(to + k, each(k));
}

// factor <- softmax(logits) over each unit's points; overwrites the logits. Computes exp(logit - c), where c is 0 if no
// logit of the unit makes exp overflow or underflow, which saves the search for the largest, and the largest otherwise.
template <typename T>
INTERNIMAGE_NOINLINE void softmax(const Points<T>& s, int64_t units, int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  constexpr T kModerate = 60;
  const int64_t total = units * points;
  auto moderate = V{} == V{};
  for (int64_t t = 0; t < total; t += N) {
    const V v = load<V>(s.logits + t);  // zeros past the end
    moderate &= (v < kModerate) & (v > -kModerate);
  }
  bool all_moderate = true;
  for (int i = 0; i < N; ++i) all_moderate &= moderate[i] != 0;
  if (!all_moderate) {
    for (int64_t u = 0; u < units; ++u) {
      T* logits = s.logits + u * points;
      T largest = logits[0];
      bool unit_moderate = true;
      for (int64_t k = 0; k < points; ++k) {
        largest = logits[k] > largest ? logits[k] : largest;
        unit_moderate &= logits[k] < kModerate && logits[k] > -kModerate;
      }
      for (int64_t k = 0; k < points && !unit_moderate; ++k) logits[k] -= largest;
    }
  }
  constexpr int K = 4;
  for (int64_t t = 0; t < total; t += K * N) {
    V v[K];
    for (int k = 0; k < K; ++k) v[k] = load<V>(s.logits + t + k * N);
    exponential<N, K>(v);
    for (int k = 0; k < K; ++k) store(s.logits + t + k * N, v[k]);
  }
  // Always four units at a time, even if fewer are left: a sum must not depend on the position of its unit.
  for (int64_t u = 0; u < units; u += 4) {
    T sum[4];
    sum_units(sum, s.logits + u * points, points);
    for (int i = 0; i < 4; ++i) {
      const T* exponentials = s.logits + (u + i) * points;
      const V inverse = broadcast<T, N>((T)1 / sum[i]);
      map_unit(s.factor + (u + i) * points, points, [&](int64_t k) { return load<V>(exponentials + k) * inverse; });
    }
  }
}

// grad_logits <- factor * (grad_factor - sum(factor * grad_factor)) over each unit's points; `product` is scratch.
template <typename T>
INTERNIMAGE_NOINLINE void softmax_backward(const T* factor, const T* grad_factor, T* product, T* grad_logits,
                                           int64_t units, int64_t points) {
  constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  for (int64_t t = 0; t < units * points; t += N) store(product + t, load<V>(factor + t) * load<V>(grad_factor + t));
  for (int64_t u = 0; u < units; u += 4) {
    T sum[4];
    sum_units(sum, product + u * points, points);
    for (int i = 0; i < 4; ++i) {
      const int64_t at = (u + i) * points;
      const V mean = broadcast<T, N>(sum[i]);
      map_unit(grad_logits + at, points,
               [&](int64_t k) { return load<V>(factor + at + k) * (load<V>(grad_factor + at + k) - mean); });
    }
  }
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
