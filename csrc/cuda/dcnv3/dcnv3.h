// SPDX-License-Identifier: MIT
// DCNv3 on CUDA: checks and memory, whoever launches the kernels. LibTorch stable ABI only.
//
// Launch is constructed with the index of a device; it has the storage types Half and BFloat16, and runs a kernel of
// gather/select.h: launch(kernel, threads, arguments...).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "../../common.h"
#include "../../problem.h"
#include "../gather/arguments.h"
#include "../gather/select.h"
#include "../gather/variants.h"
#include "../types.h"

namespace internimage {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// The tensor, contiguous and aligned to what a thread loads from a pixel; a copy if it is not. New memory is aligned.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor t = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kForwardBytes == 0 ? t : torch::stable::clone(t);
}

// Calls run with a value of the dtype's storage type.
template <typename Launch, typename Run>
void with_dtype(ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Half)
    run(typename Launch::Half());
  else if (dtype == ScalarType::BFloat16)
    run(typename Launch::BFloat16());
  else if (dtype == ScalarType::Float)
    run(float());
  else if (dtype == ScalarType::Double)
    run(double());
  else
    STD_TORCH_CHECK(false, "internimage::dcnv3: dtype must be float64, float32, bfloat16 or float16");
}

// The variants that the environment asks for; the same for the life of the process.
template <typename Launch>
const Variants& chosen_variants() {
  static const Variants chosen = [] {  // tried again by the next call if it throws
    const char* list = std::getenv(kVariantsVariable);
    Variants found;
    STD_TORCH_CHECK(parse_variants(list, found), "internimage: ", kVariantsVariable,
                    " must be names out of tiles, window and fixed, separated by commas, got '", list, "'");
    STD_TORCH_CHECK(
        Launch::kHasVariants || list == nullptr || *list == 0, "internimage: ", kVariantsVariable,
        " needs kernels that are compiled at run time, but those that nvcc compiled serve: INTERNIMAGE_NVRTC "
        "must not be 0, and torch's packages must have NVRTC");
    return found;
  }();
  return chosen;
}

// Coordinates are 32-bit; the number of elements of an image may be larger.
inline void check_size(const Problem& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  STD_TORCH_CHECK(p.height + 2 * p.pad_h < kLimit && p.width + 2 * p.pad_w < kLimit && p.channels < kLimit &&
                      p.stride_h < kLimit && p.stride_w < kLimit && p.points < kLimit,
                  "internimage::dcnv3: an image of ", p.height, " x ", p.width, " x ", p.channels, " is too large");
}

template <typename Launch>
Tensor dcnv3(const Tensor& input, const Tensor& offset, const Tensor& mask, std::vector<int64_t> kernel_size,
             std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
             double offset_scale, bool remove_center, bool softmax) {
  const Problem p = make_problem("dcnv3", input, offset, mask, kernel_size, stride, padding, dilation, groups,
                                 offset_scale, remove_center, softmax);
  check_size(p);
  const Variants& variants = chosen_variants<Launch>();
  const DeviceGuard guard(input.get_device_index());
  Tensor output = torch::stable::new_empty(input, {p.batch, p.out_height, p.out_width, p.channels});
  if (output.numel() == 0) return output;
  const Tensor in = aligned(input), off = aligned(offset), m = aligned(mask);
  const Launch launch(input.get_device_index());
  with_dtype<Launch>(input.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    forward(p, static_cast<const S*>(in.const_data_ptr()), static_cast<const S*>(off.const_data_ptr()),
            static_cast<const S*>(m.const_data_ptr()), static_cast<S*>(output.mutable_data_ptr()), false, variants,
            launch);
  });
  return output;
}

template <typename Launch>
std::tuple<Tensor, Tensor, Tensor> dcnv3_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                  const Tensor& mask, std::vector<int64_t> kernel_size,
                                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                  std::vector<int64_t> dilation, int64_t groups, double offset_scale,
                                                  bool remove_center, bool softmax, bool deterministic,
                                                  std::vector<bool> output_mask) {
  const ScalarType dtype = input.scalar_type();
  const Problem p = make_problem("dcnv3", input, offset, mask, kernel_size, stride, padding, dilation, groups,
                                 offset_scale, remove_center, softmax);
  check_size(p);
  check_backward("dcnv3", p, p.channels, grad_output, input, output_mask);
  const Variants& variants = chosen_variants<Launch>();
  const DeviceGuard guard(input.get_device_index());
  const bool want_input = output_mask[0], want_points = output_mask[1] || output_mask[2];
  // summed in the compute type and rounded once
  const ScalarType sum_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto shape = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
  Tensor grad_input = want_input ? torch::stable::new_zeros(input, shape(input), sum_dtype)
                                 : torch::stable::new_empty(input, {0}, sum_dtype);
  const bool is_empty = grad_output.numel() == 0;  // without channels; offset and mask still have elements
  const auto new_grad = [&](const Tensor& t) {
    if (!want_points) return torch::stable::new_empty(input, {0});
    return is_empty ? torch::stable::new_zeros(input, shape(t)) : torch::stable::new_empty(input, shape(t));
  };
  Tensor grad_offset = new_grad(offset), grad_mask = new_grad(mask);
  if (!is_empty && (want_input || want_points)) {
    const Tensor grad = aligned(grad_output), in = aligned(input), off = aligned(offset), m = aligned(mask);
    const Launch launch(input.get_device_index());
    with_dtype<Launch>(dtype, [&](auto zero) {
      using S = decltype(zero);
      using T = Compute<S>;
      const int64_t elements = want_input ? fixed_elements<S>(p, deterministic, variants) : 0;
      std::optional<Tensor> memory;
      if (elements > 0) memory = torch::stable::new_zeros(input, {elements}, ScalarType::Long);
      backward(p, static_cast<const S*>(grad.const_data_ptr()), static_cast<const S*>(in.const_data_ptr()),
               static_cast<const S*>(off.const_data_ptr()), static_cast<const S*>(m.const_data_ptr()),
               want_input ? static_cast<T*>(grad_input.mutable_data_ptr()) : nullptr,
               want_points ? static_cast<S*>(grad_offset.mutable_data_ptr()) : nullptr,
               want_points ? static_cast<S*>(grad_mask.mutable_data_ptr()) : nullptr, deterministic,
               memory ? static_cast<uint64_t*>(memory->mutable_data_ptr()) : nullptr, false, variants, launch);
    });
  }
  if (sum_dtype != dtype) grad_input = torch::stable::to(grad_input, dtype);
  const auto drop = [&](Tensor& t, bool wanted) {
    if (!wanted && t.numel() > 0) t = torch::stable::new_empty(input, {0});
  };
  drop(grad_offset, output_mask[1]);
  drop(grad_mask, output_mask[2]);
  return {grad_input, grad_offset, grad_mask};
}

}  // namespace cuda
}  // namespace internimage
