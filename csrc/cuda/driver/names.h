// SPDX-License-Identifier: MIT
// The kernels of select.h as C++ expressions, which NVRTC instantiates.
#pragma once

#include <cstdint>
#include <string>

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

// As in "forward_kernel<__half, 16, 9, true, uint32_t>".
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
std::string name_of(ForwardKernel<S, kChannels, kPoints, kSoftmax, Index>) {
  return std::string("forward_kernel<") + kTypeName<S> + ", " + std::to_string(kChannels) + ", " +
         std::to_string(kPoints) + ", " + (kSoftmax ? "true" : "false") + ", " + kTypeName<Index> + ">";
}
template <typename S, int kChannels, typename Index>
std::string name_of(BackwardKernel<S, kChannels, Index>) {
  return std::string("backward_kernel<") + kTypeName<S> + ", " + std::to_string(kChannels) + ", " + kTypeName<Index> +
         ">";
}
template <typename S, int kPoints, int kLanes, typename Index>
std::string name_of(Backward3x3Kernel<S, kPoints, kLanes, Index>) {
  return std::string("backward_3x3_kernel<") + kTypeName<S> + ", " + std::to_string(kPoints) + ", " +
         std::to_string(kLanes) + ", " + kTypeName<Index> + ">";
}
template <typename S, typename Index>
std::string name_of(DeterministicKernel<S, Index>) {
  return std::string("deterministic_kernel<") + kTypeName<S> + ", " + kTypeName<Index> + ">";
}

}  // namespace cuda
}  // namespace internimage
