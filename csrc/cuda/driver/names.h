// SPDX-License-Identifier: MIT
// The kernels of select.h as C++ expressions, which NVRTC instantiates.
#pragma once

#include <cstdint>
#include <string>

#include "../gather/arguments.h"
#include "../gather/select.h"

namespace internimage {
namespace cuda {

// Of the size of CUDA's types, which a host compiler does not know.
struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

template <typename T>
constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<HalfBits> = "__half";
template <>
inline constexpr const char* kTypeName<BFloat16Bits> = "__nv_bfloat16";
template <>
inline constexpr const char* kTypeName<float> = "float";
template <>
inline constexpr const char* kTypeName<double> = "double";
template <>
inline constexpr const char* kTypeName<uint32_t> = "uint32_t";
template <>
inline constexpr const char* kTypeName<uint64_t> = "uint64_t";

inline std::string text_of(int number) { return std::to_string(number); }
inline std::string text_of(bool value) { return value ? "true" : "false"; }

// As in "forward_kernel<__half, 16, 9, true, uint32_t>": the kernel, its storage type, numbers, and type of indices;
// then the layout, if it is not dense.
template <typename S, typename Index, int kLayout = kDense, typename... Numbers>
std::string expression(const char* kernel, Numbers... numbers) {
  std::string text = std::string(kernel) + "<" + kTypeName<S> + ", ";
  ((text += text_of(numbers) + ", "), ...);
  return text + kTypeName<Index> + (kLayout == kDense ? "" : ", " + text_of(kLayout)) + ">";
}

template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index, int kLayout>
std::string name_of(ForwardKernel<S, kChannels, kPoints, kSoftmax, Index, kLayout>) {
  return expression<S, Index, kLayout>("forward_kernel", kChannels, kPoints, kSoftmax);
}
template <typename S, int kChannels, typename Index, int kLayout>
std::string name_of(BackwardKernel<S, kChannels, Index, kLayout>) {
  return expression<S, Index, kLayout>("backward_kernel", kChannels);
}
template <typename S, int kPoints, int kLanes, typename Index, int kLayout>
std::string name_of(Backward3x3Kernel<S, kPoints, kLanes, Index, kLayout>) {
  return expression<S, Index, kLayout>("backward3x3_kernel", kPoints, kLanes);
}
template <typename S, typename Index, int kLayout>
std::string name_of(DeterministicKernel<S, Index, kLayout>) {
  return expression<S, Index, kLayout>("deterministic_kernel");
}
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
std::string name_of(TilesKernel<S, kChannels, kPoints, kSoftmax, Index>) {
  return expression<S, Index>("tiles_kernel", kChannels, kPoints, kSoftmax);
}
template <typename S, int kPoints, typename Index>
std::string name_of(WindowKernel<S, kPoints, Index>) {
  return expression<S, Index>("window_kernel", kPoints);
}
template <typename S, typename Index>
std::string name_of(FixedRangeKernel<S, Index>) {
  return expression<S, Index>("fixed_range_kernel");
}
template <typename S, int kChannels, typename Index>
std::string name_of(FixedSumKernel<S, kChannels, Index>) {
  return expression<S, Index>("fixed_sum_kernel", kChannels);
}
template <typename S, typename Index>
std::string name_of(FixedSlowKernel<S, Index>) {
  return expression<S, Index>("fixed_slow_kernel");
}
template <typename S, typename Index>
std::string name_of(FixedRoundKernel<S, Index>) {
  return expression<S, Index>("fixed_round_kernel");
}

}  // namespace cuda
}  // namespace internimage
