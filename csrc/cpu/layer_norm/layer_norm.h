// SPDX-License-Identifier: MIT
// Layer norm over the last dimension, for inference, fused with the layer scale and the residual addition that follow.
// Rows are short, and a single one is a chain of dependent additions, so four are processed at a time.
#pragma once

#include <cstdint>

#include "../simd/shuffle.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "arguments.h"
#include "statistics.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Rows of a half type of at most this many elements are converted once, for all three passes.
constexpr int kNormBuffer = 1024;

// Normalizes the four rows that begin at `at`; without Sum some may be the same. Scale and residual are rounded as in
// separate operators: in float32 and float64 the result is bit for bit that of norm, product and sum one by one.
template <typename S, typename T, bool Sum, bool Residual, bool Buffered>
INTERNIMAGE_INLINE void norm_rows(const LayerNormArguments& norm, const int64_t (&at)[4]) {
  const int64_t channels = norm.channels;
  const S *input = (const S*)norm.input, *residual = (const S*)norm.residual;
  const S *weight = (const S*)norm.weight, *bias = (const S*)norm.bias, *scale = (const S*)norm.scale;
  S* output = (S*)norm.output;
  T buffer[4][Buffered ? kNormBuffer : 1];
  const auto first = [&](int r, int64_t c, auto lanes) __attribute__((always_inline)) {
    using C = Convert<S, T, decltype(lanes)::value>;
    if constexpr (Sum)
      C::store((S*)norm.input + at[r] + c, C::load(input + at[r] + c) + C::load((const S*)norm.addend + at[r] + c));
    const auto v = C::load(input + at[r] + c);
    if constexpr (Buffered) store(&buffer[r][c], v);
    return v;
  };
  const auto value = [&](int r, int64_t c, auto lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value;
    if constexpr (Buffered)
      return load<Vector<T, N>>(&buffer[r][c]);
    else
      return Convert<S, T, N>::load(input + at[r] + c);
  };
  T mean[4], factor[4];
  normalization<T>(mean, factor, channels, (T)norm.eps, first, value);
  const auto write = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value;
    using C = Convert<S, T, N>;
    const Vector<T, N> w = C::load(weight + c), b = C::load(bias + c);
    Vector<T, N> v[4];
    for (int r = 0; r < 4; ++r) v[r] = uncontracted<T, N>((value(r, c, lanes) - mean[r]) * factor[r] * w) + b;
    if (scale != nullptr) {
      const Vector<T, N> s = C::load(scale + c);
      for (int r = 0; r < 4; ++r) v[r] = uncontracted<T, N>(v[r] * s);
    }
    if constexpr (Residual)
      for (int r = 0; r < 4; ++r) v[r] += C::load(residual + at[r] + c);
    for (int r = 0; r < 4; ++r) C::store(output + at[r] + c, v[r]);
  };
  constexpr int N = kLanes<T>;
  int64_t c = 0;
  for (; c + N <= channels; c += N) write(c, Constant<N>{});
  for (; c < channels; ++c) write(c, Constant<1>{});
}

template <typename S, typename T, bool Sum>
INTERNIMAGE_INLINE void norm_four(const LayerNormArguments& norm, const int64_t (&at)[4]) {
  const auto run = [&](auto buffered) __attribute__((always_inline)) {
    constexpr bool kBuffered = decltype(buffered)::value != 0;
    if (norm.residual != nullptr)
      norm_rows<S, T, Sum, true, kBuffered>(norm, at);
    else
      norm_rows<S, T, Sum, false, kBuffered>(norm, at);
  };
  if (sizeof(S) < sizeof(T) && norm.channels <= kNormBuffer)
    run(Constant<1>{});
  else
    run(Constant<0>{});
}

// Adds to rows [begin, end) of the input.
template <typename S, typename T>
INTERNIMAGE_NOINLINE void add_rows(const LayerNormArguments& norm, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>;
  S* to = (S*)norm.input;
  const S* addend = (const S*)norm.addend;
  const auto add = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    using C = Convert<S, T, decltype(lanes)::value>;
    C::store(to + i, C::load(to + i) + C::load(addend + i));
  };
  int64_t i = begin * norm.channels;
  for (; i + N <= end * norm.channels; i += N) add(i, Constant<N>{});
  for (; i < end * norm.channels; ++i) add(i, Constant<1>{});
}

// Normalizes rows [begin, end), four at a time; the last row is repeated to make the last four.
template <typename S, typename T>
void layer_norm(const LayerNormArguments& norm, int64_t begin, int64_t end) {
  int64_t row = begin;
  const auto four = [&](int64_t (&at)[4]) __attribute__((always_inline)) {
    for (int r = 0; r < 4; ++r) at[r] = (row + r < end ? row + r : end - 1) * norm.channels;
  };
  int64_t at[4];
  if (norm.addend != nullptr) {
    for (; row + 4 <= end; row += 4) {
      four(at);
      norm_four<S, T, true>(norm, at);
    }
    add_rows<S, T>(norm, row, end);  // a repeated row must be added to once
  }
  for (; row < end; row += 4) {
    four(at);
    norm_four<S, T, false>(norm, at);
  }
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
