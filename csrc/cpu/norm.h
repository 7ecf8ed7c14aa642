// SPDX-License-Identifier: MIT
// Layer norm over the last axis, for inference. The rows of a feature map are short; taken one by one, each is a chain of
// sums that wait for each other.

namespace internimage {
namespace INTERNIMAGE_ISA {

// Sums of four rows of n numbers: each(row, index, lanes as a constant) gives a vector of that many of them.
template <typename T, typename Each>
INTERNIMAGE_INLINE void sum_rows(T* sums, int64_t n, Each each) {
  constexpr int N = kLanes<T>;
  Vector<T, N> part[4] = {};
  T rest[4] = {};
  int64_t c = 0;
  for (; c + N <= n; c += N)
    for (int r = 0; r < 4; ++r) part[r] += each(r, c, Constant<N>{});
  for (; c < n; ++c)
    for (int r = 0; r < 4; ++r) rest[r] += each(r, c, Constant<1>{})[0];
  sum4<T, N>(sums, part[0], part[1], part[2], part[3]);
  for (int r = 0; r < 4; ++r) sums[r] += rest[r];
}

// Four rows of `channels` numbers, which may be the same one.
template <typename S, typename T>
INTERNIMAGE_INLINE void norm_rows(const S* const (&from)[4], const S* weight, const S* bias, S* const (&to)[4],
                                  int64_t channels, double eps) {
  const auto value = [&](int r, int64_t c, auto lanes) __attribute__((always_inline)) {
    return Convert<S, T, decltype(lanes)::value>::load(from[r] + c);
  };
  T mean[4], scale[4];
  sum_rows<T>(mean, channels, value);
  for (int r = 0; r < 4; ++r) mean[r] /= (T)channels;
  sum_rows<T>(scale, channels, [&](int r, int64_t c, auto lanes) __attribute__((always_inline)) {
    const auto deviation = value(r, c, lanes) - mean[r];
    return deviation * deviation;
  });
  for (int r = 0; r < 4; ++r) scale[r] = (T)1 / (T)__builtin_sqrt(scale[r] / (T)channels + (T)eps);
  const auto write = [&](int64_t c, auto lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value;
    using C = Convert<S, T, N>;
    const Vector<T, N> w = C::load(weight + c), b = C::load(bias + c);
    Vector<T, N> v[4];
    for (int r = 0; r < 4; ++r) v[r] = (value(r, c, lanes) - mean[r]) * scale[r] * w + b;
    for (int r = 0; r < 4; ++r) C::store(to[r] + c, v[r]);
  };
  constexpr int N = kLanes<T>;
  int64_t c = 0;
  for (; c + N <= channels; c += N) write(c, Constant<N>{});
  for (; c < channels; ++c) write(c, Constant<1>{});
}

// Rows [begin, end), four at a time; the last of them fills the last four up.
template <typename S, typename T>
void layer_norm(const void* input, const void* weight, const void* bias, void* output, int64_t channels, double eps,
                int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += 4) {
    const S* from[4];
    S* to[4];
    for (int r = 0; r < 4; ++r) {
      const int64_t at = (row + r < end ? row + r : end - 1) * channels;
      from[r] = (const S*)input + at;
      to[r] = (S*)output + at;
    }
    norm_rows<S, T>(from, (const S*)weight, (const S*)bias, to, channels, eps);
  }
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
