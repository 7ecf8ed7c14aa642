// SPDX-License-Identifier: MIT
// GELU and its gradient.
#pragma once

#include <cstdint>

#include "../simd/gelu.h"
#include "../simd/shuffle.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// output[i] = gelu(input[i]) for i in [begin, end); the output may be the input.
template <typename S, typename T>
void gelu_range(const void* input, void* output, int64_t begin, int64_t end) {
  const S* from = (const S*)input;
  S* to = (S*)output;
  const auto run = [&](int64_t at, auto lanes, auto vectors) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value, K = decltype(vectors)::value;
    using C = Convert<S, T, N>;
    Vector<T, N> v[K];
    if constexpr (K == 1) {
      v[0] = C::load(from + at);
      gelu<N, K>(v);
      C::store(to + at, v[0]);
    } else {
      for (int k = 0; k < K; k += 2) C::load_two(from + at + k * N, v[k], v[k + 1]);
      gelu<N, K>(v);
      for (int k = 0; k < K; k += 2) C::store_two(to + at + k * N, v[k], v[k + 1]);
    }
  };
  constexpr int N = kLanes<T>, K = 4;
  int64_t i = begin;
  for (; i + K * N <= end; i += K * N) run(i, Constant<N>{}, Constant<K>{});
  for (; i + N <= end; i += N) run(i, Constant<N>{}, Constant<1>{});
  for (; i < end; ++i) run(i, Constant<1>{}, Constant<1>{});
}

// grad_input[i] = grad_output[i] * the derivative of GELU at input[i], for i in [begin, end).
template <typename S, typename T>
void gelu_backward_range(const void* grad_output, const void* input, void* grad_input, int64_t begin, int64_t end) {
  const S *grad = (const S*)grad_output, *from = (const S*)input;
  S* to = (S*)grad_input;
  const auto run = [&](int64_t at, auto lanes, auto vectors) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value, K = decltype(vectors)::value;
    using C = Convert<S, T, N>;
    Vector<T, N> v[K];
    for (int k = 0; k < K; ++k) v[k] = C::load(from + at + k * N);
    gelu_derivative<N, K>(v);
    for (int k = 0; k < K; ++k) C::store(to + at + k * N, C::load(grad + at + k * N) * v[k]);
  };
  constexpr int N = kLanes<T>, K = 4;
  int64_t i = begin;
  for (; i + K * N <= end; i += K * N) run(i, Constant<N>{}, Constant<K>{});
  for (; i + N <= end; i += N) run(i, Constant<N>{}, Constant<1>{});
  for (; i < end; ++i) run(i, Constant<1>{}, Constant<1>{});
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
