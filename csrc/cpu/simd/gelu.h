// SPDX-License-Identifier: MIT
// GELU, x * Phi(x) with the cumulative distribution function Phi of the normal distribution.
#pragma once

#include <cstdint>

#include "target.h"
#include "vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// x[k] <- gelu(x[k]). In float the error is at most 2.4e-7, and 1e-5 of the result for x > -5; NaN stays NaN. K vectors at
// once, as a single one is a long chain of dependent operations.
//
// With h = |x| / 2, gelu(x) = x / 2 + h - h * 2 Phi(-|x|): no digits cancel for negative x, as they do in
// x / 2 * (1 + erf(x / sqrt(2))). 2 Phi(-|x|) is the eighth power of a polynomial in h, a minimax fit of
// (2 Phi(-2h))^(1/8) for h < 2.75 that is exact at 0; the root varies so slowly that degree 10 suffices. For larger h
// it is taken as 0.
template <int N, int K>
INTERNIMAGE_INLINE void gelu(Vector<float, N> (&x)[K]) {
  using F = Vector<float, N>;
  using I = Vector<int32_t, N>;
  constexpr float kEnd = 2.75f;
  constexpr float kCoefficients[] = {2.2431152046920033e-06f, -2.7507385311764665e-05f, 5.5715743656037375e-05f,
                                     0.0006687786662951112f,  -0.003601227654144168f,   0.0006006751209497452f,
                                     0.02660580538213253f,    -0.005986904259771109f,   -0.13924826681613922f,
                                     -0.1994718760251999f,    1.0f};
  F magnitude[K], h[K], root[K];
  for (int k = 0; k < K; ++k) {
    x[k] *= 0.5f;
    magnitude[k] = (F)((I)x[k] & 0x7fffffff);
    h[k] = magnitude[k] < kEnd ? magnitude[k] : F{} + kEnd;  // also for NaN
    root[k] = broadcast<float, N>(kCoefficients[0]);
  }
  for (int i = 1; i < 11; ++i)
    for (int k = 0; k < K; ++k) root[k] = root[k] * h[k] + kCoefficients[i];
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < K; ++k) root[k] *= root[k];
  for (int k = 0; k < K; ++k) {
    const F twice_tail = magnitude[k] < kEnd ? root[k] * root[k] : F{};
    x[k] = (x[k] + magnitude[k]) - h[k] * twice_tail;
  }
}

template <int N, int K>
INTERNIMAGE_INLINE void gelu(Vector<double, N> (&x)[K]) {
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < N; ++i) x[k][i] *= 0.5 * __builtin_erfc(-0.70710678118654752440 * x[k][i]);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
