// SPDX-License-Identifier: MIT
// The exponential function.
#pragma once

#include <cstdint>

#include "target.h"
#include "vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// x[k] <- exp(x[k]), in float to about one unit in the last place (the polynomial of Cephes). NaN stays NaN. Requires
// x <= 88; below -87 the result is 0. K vectors at once, as a single one is a long chain of dependent operations.
template <int N, int K>
INTERNIMAGE_INLINE void exponential(Vector<float, N> (&x)[K]) {
  using F = Vector<float, N>;
  using I = Vector<int32_t, N>;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kCoefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F r[K], e[K];
  I n[K];
  for (int k = 0; k < K; ++k) {
    const F y = x[k] > -87.0f ? x[k] : F{} - 87.0f;  // also for NaN
    const F shifted = y * 1.44269504088896341f + kRound;
    n[k] = (I)shifted - (I)(F{} + kRound);
    const F whole = shifted - kRound;
    r[k] = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    e[k] = broadcast<float, N>(kCoefficients[0]);
  }
  for (int i = 1; i < 6; ++i)
    for (int k = 0; k < K; ++k) e[k] = e[k] * r[k] + kCoefficients[i];
  for (int k = 0; k < K; ++k) {
    e[k] = e[k] * (r[k] * r[k]) + r[k] + 1.0f;
    e[k] *= (F)((n[k] + 127) << 23);
    x[k] = x[k] < -87.0f ? F{} : e[k] + (x[k] - x[k]);  // the difference is 0, or NaN
  }
}

template <int N, int K>
INTERNIMAGE_INLINE void exponential(Vector<double, N> (&x)[K]) {
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < N; ++i) x[k][i] = __builtin_exp(x[k][i]);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
