// SPDX-License-Identifier: MIT
// GELU, x * Phi(x) with the cumulative distribution function Phi of the normal distribution.
#pragma once

#include <cstdint>

#include "exponential.h"
#include "target.h"
#include "vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// What is left of GELU after half of x: with h = |x| / 2,
//
//   gelu(x) = x Phi(x) = x / 2 + h - h * 2 Phi(-|x|)
//
// where no digits cancel for negative x, as they do in x / 2 * (1 + erf(x / sqrt(2))). 2 Phi(-|x|) is the eighth power
// of a polynomial in h, a minimax fit of (2 Phi(-2h))^(1/8) for h < 2.75 that is exact at 0; the root varies so slowly
// that degree 10 suffices. For larger h it is taken as 0. K vectors at once, as a single one is a long chain of
// dependent operations.
template <int N, int K>
struct GeluTail {
  using F = Vector<float, N>;
  F magnitude[K];  // |x| / 2, NaN for NaN
  F h[K];  // at most 2.75, also for NaN
  F twice_tail[K];  // 2 Phi(-|x|)

  explicit INTERNIMAGE_INLINE GeluTail(const F (&half)[K]) {
    constexpr float kEnd = 2.75f;
    constexpr float kCoefficients[] = {2.2431152046920033e-06f,
                                       -2.7507385311764665e-05f,
                                       5.5715743656037375e-05f,
                                       0.0006687786662951112f,
                                       -0.003601227654144168f,
                                       0.0006006751209497452f,
                                       0.02660580538213253f,
                                       -0.005986904259771109f,
                                       -0.13924826681613922f,
                                       -0.1994718760251999f,
                                       1.0f};
    F root[K];
    for (int k = 0; k < K; ++k) {
      magnitude[k] = (F)((Vector<int32_t, N>)half[k] & 0x7fffffff);
      h[k] = magnitude[k] < kEnd ? magnitude[k] : F{} + kEnd;
      root[k] = broadcast<float, N>(kCoefficients[0]);
    }
    for (int i = 1; i < 11; ++i)
      for (int k = 0; k < K; ++k) root[k] = root[k] * h[k] + kCoefficients[i];
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < K; ++k) root[k] *= root[k];
    for (int k = 0; k < K; ++k) twice_tail[k] = magnitude[k] < kEnd ? root[k] * root[k] : F{};
  }
};

// x[k] <- gelu(x[k]). In float the error is at most 2.4e-7, and 1e-5 of the result for x > -5; NaN stays NaN.
template <int N, int K>
INTERNIMAGE_INLINE void gelu(Vector<float, N> (&x)[K]) {
  for (int k = 0; k < K; ++k) x[k] *= 0.5f;
  const GeluTail<N, K> tail(x);
  for (int k = 0; k < K; ++k) x[k] = (x[k] + tail.magnitude[k]) - tail.h[k] * tail.twice_tail[k];
}

// x[k] <- the derivative of GELU, Phi(x) + x phi(x), with an error of at most 5e-7; NaN stays NaN.
template <int N, int K>
INTERNIMAGE_INLINE void gelu_derivative(Vector<float, N> (&x)[K]) {
  using F = Vector<float, N>;
  constexpr float kInverseRoot = 0.3989422804014327f;  // 1 / sqrt(2 pi)
  F half[K], density[K];
  for (int k = 0; k < K; ++k) {
    half[k] = x[k] * 0.5f;
    const F bounded = x[k] > 13.0f    ? F{} + 13.0f
                      : x[k] < -13.0f ? F{} - 13.0f
                                      : x[k];  // infinity times 0 is not a number
    density[k] = bounded * bounded * -0.5f;
    x[k] = bounded;
  }
  const GeluTail<N, K> tail(half);
  exponential<N, K>(density);
  for (int k = 0; k < K; ++k) {
    const F below = tail.twice_tail[k] * 0.5f;  // Phi(-|x|)
    x[k] = (half[k] > 0.0f ? 1.0f - below : below) + x[k] * (density[k] * kInverseRoot);
  }
}

template <int N, int K>
INTERNIMAGE_INLINE void gelu(Vector<double, N> (&x)[K]) {
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < N; ++i) x[k][i] *= 0.5 * __builtin_erfc(-0.70710678118654752440 * x[k][i]);
}

template <int N, int K>
INTERNIMAGE_INLINE void gelu_derivative(Vector<double, N> (&x)[K]) {
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < N; ++i) {
      const double v = x[k][i], bounded = v > 40 ? 40 : v < -40 ? -40 : v;
      x[k][i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * v) +
                bounded * (0.39894228040143267794 * __builtin_exp(-0.5 * bounded * bounded));
    }
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
