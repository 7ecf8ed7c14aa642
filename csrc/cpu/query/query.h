// SPDX-License-Identifier: MIT
// The query of DCNv3 for inference: depthwise convolution, layer norm and GELU in one pass. The convolution's result
// stays in the L1 cache, in the compute type; the output is rounded once.
#pragma once

#include <cstdint>

#include "../layer_norm/statistics.h"
#include "../simd/gelu.h"
#include "../simd/shuffle.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "arguments.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// How many output pixels a strip has: few enough for the L1 cache, and a multiple of four.
template <typename T>
inline int64_t query_strip(const QueryArguments& q) {
  const int64_t fitting = 16384 / (q.channels * (int64_t)sizeof(T)) / 4 * 4, row = (q.out_width + 3) / 4 * 4;
  return fitting < 4 ? 4 : fitting < row ? fitting : row;
}

// The bias and the taps, as vectors over channels, and the strip's convolution.
template <typename T>
inline int64_t query_scratch(const QueryArguments& q) {
  return (1 + q.kernel_h * q.kernel_w + query_strip<T>(q)) * q.channels * (int64_t)sizeof(T);
}

// The taps that are inside the image on one axis: [begin, end) of `kernel` ones, the first of which is at `from`.
struct Taps {
  int64_t begin, end;

  Taps(int64_t from, int64_t kernel, int64_t size)
      : begin(from < 0 ? -from : 0), end(from + kernel <= size ? kernel : size - from) {}
};

// Convolves P adjacent output pixels in N channels; kKernel is the kernel's width for stride 1, else 0.
template <typename S, typename T, int N, int P, int kKernel>
INTERNIMAGE_INLINE void convolve(const QueryArguments& q, const T* taps, const S* image, int64_t from_y, int64_t from_x,
                                 Taps down, Taps across, T* out) {
  using V = Vector<T, N>;
  const int64_t channels = q.channels;
  V sum[P];
  for (int i = 0; i < P; ++i) sum[i] = load<V>(taps);
  for (int64_t y = down.begin; y < down.end; ++y) {
    const S* row = image + ((from_y + y) * q.width + from_x) * channels;
    const T* tap = taps + (1 + y * q.kernel_w) * channels;
    if constexpr (kKernel > 0) {
      V pixel[P + kKernel - 1];
      for (int i = 0; i < P + kKernel - 1; ++i) pixel[i] = Convert<S, T, N>::load(row + i * channels);
      for (int x = 0; x < kKernel; ++x) {
        const V weight = load<V>(tap + x * channels);
        for (int i = 0; i < P; ++i) sum[i] += pixel[i + x] * weight;
      }
    } else {
      for (int64_t x = across.begin; x < across.end; ++x) {
        const V weight = load<V>(tap + x * channels);
        for (int i = 0; i < P; ++i) sum[i] += Convert<S, T, N>::load(row + (i * q.stride_w + x) * channels) * weight;
      }
    }
  }
  for (int i = 0; i < P; ++i) store(out + i * channels, sum[i]);
}

// Convolves the `pixels` output pixels from (y, x) on, in N channels.
template <typename S, typename T, int N>
INTERNIMAGE_INLINE void convolve_strip(const QueryArguments& q, const T* taps, const S* image, int64_t y, int64_t x,
                                       int64_t pixels, T* out) {
  const int64_t from_y = y * q.stride_h - q.pad_h;
  const Taps down(from_y, q.kernel_h, q.height);
  for (int64_t i = 0; i < pixels;) {
    const int64_t from_x = (x + i) * q.stride_w - q.pad_w;
    const Taps all(0, q.kernel_w, q.kernel_w);
    T* to = out + i * q.channels;
    if (i + 4 <= pixels && from_x >= 0 && from_x + 3 * q.stride_w + q.kernel_w <= q.width) {
      if (q.stride_w == 1 && q.kernel_w == 3)
        convolve<S, T, N, 4, 3>(q, taps, image, from_y, from_x, down, all, to);
      else if (q.stride_w == 1 && q.kernel_w == 5)
        convolve<S, T, N, 4, 5>(q, taps, image, from_y, from_x, down, all, to);
      else
        convolve<S, T, N, 4, 0>(q, taps, image, from_y, from_x, down, all, to);
      i += 4;
    } else {
      convolve<S, T, N, 1, 0>(q, taps, image, from_y, from_x, down, Taps(from_x, q.kernel_w, q.width), to);
      ++i;
    }
  }
}

// Normalizes and activates four rows of the convolution's result, which may be the same.
template <typename S, typename T>
INTERNIMAGE_INLINE void finish_rows(const QueryArguments& q, const T* const (&from)[4], S* const (&to)[4]) {
  const auto value = [&](int r, int64_t c, auto lanes) __attribute__((always_inline)) {
    return load<Vector<T, decltype(lanes)::value>>(from[r] + c);
  };
  T mean[4], factor[4];
  normalization<T>(mean, factor, q.channels, (T)q.eps, value, value);
  const auto write = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value;
    using C = Convert<S, T, N>;
    const Vector<T, N> w = C::load((const S*)q.norm_weight + c), b = C::load((const S*)q.norm_bias + c);
    Vector<T, N> v[4];
    for (int r = 0; r < 4; ++r) v[r] = (value(r, c, lanes) - mean[r]) * factor[r] * w + b;
    gelu<N, 4>(v);
    for (int r = 0; r < 4; ++r) C::store(to[r] + c, v[r]);
  };
  constexpr int N = kLanes<T>;
  int64_t c = 0;
  for (; c + N <= q.channels; c += N) write(c, Constant<N>{});
  for (; c < q.channels; ++c) write(c, Constant<1>{});
}

// Computes output rows [begin, end), counted over all images.
template <typename S, typename T>
void query(const QueryArguments& q, void* scratch, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>;
  const int64_t points = q.kernel_h * q.kernel_w, strip = query_strip<T>(q);
  T *taps = (T*)scratch, *convolved = taps + (1 + points) * q.channels;
  for (int64_t c = 0; c < q.channels; ++c) {
    taps[c] = q.conv_bias == nullptr ? (T)0 : Convert<S, T, 1>::load((const S*)q.conv_bias + c)[0];
    for (int64_t k = 0; k < points; ++k)
      taps[(1 + k) * q.channels + c] = Convert<S, T, 1>::load((const S*)q.conv_weight + c * points + k)[0];
  }
  for (int64_t row = begin; row < end; ++row) {
    const S* image = (const S*)q.input + row / q.out_height * q.height * q.width * q.channels;
    for (int64_t x = 0; x < q.out_width; x += strip) {
      const int64_t pixels = x + strip <= q.out_width ? strip : q.out_width - x;
      int64_t c = 0;
      for (; c + N <= q.channels; c += N)
        convolve_strip<S, T, N>(q, taps + c, image + c, row % q.out_height, x, pixels, convolved + c);
      for (; c < q.channels; ++c)
        convolve_strip<S, T, 1>(q, taps + c, image + c, row % q.out_height, x, pixels, convolved + c);
      S* output = (S*)q.output + (row * q.out_width + x) * q.channels;
      for (int64_t i = 0; i < pixels; i += 4) {
        const T* from[4];
        S* to[4];
        for (int r = 0; r < 4; ++r) {
          const int64_t at = (i + r < pixels ? i + r : pixels - 1) * q.channels;
          from[r] = convolved + at;
          to[r] = output + at;
        }
        finish_rows<S, T>(q, from, to);
      }
    }
  }
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
