// SPDX-License-Identifier: MIT
// Registration of layer norm on the CPU. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../../boxed.h"
#include "../../dense.h"
#include "../isa/dispatch.h"
#include "../isa/kernel_table.h"
#include "../operators.h"
#include "arguments.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;

// Writes to `output`, which may be the residual.
void normalize(const Tensor& output, const Tensor& input, const Tensor& weight, const Tensor& bias, double eps,
               const OptionalTensor& residual, const OptionalTensor& scale, const Tensor* addend = nullptr) {
  const auto is_row = [&](const Tensor& t) {
    return input.dim() > 0 && t.dim() == 1 && t.size(0) == input.size(input.dim() - 1) && t.size(0) > 0 &&
           t.scalar_type() == input.scalar_type();
  };
  STD_TORCH_CHECK(is_row(weight) && is_row(bias) && (!scale || is_row(*scale)),
                  "internimage::layer_norm: weight, bias and scale must be vectors of input's last size and of its "
                  "dtype");
  STD_TORCH_CHECK(!residual || (residual->scalar_type() == input.scalar_type() && same_sizes(*residual, input)),
                  "internimage::layer_norm: residual must have input's shape and dtype");
  const Kernels& kernels = kernels_of(input.scalar_type());
  const Tensor in = dense(input), w = dense(weight), b = dense(bias);
  const Tensor r = residual ? dense(*residual) : in;
  const Tensor s = scale ? dense(*scale) : w;
  if (output.numel() == 0) return;
  const int64_t channels = w.size(0);
  const LayerNormArguments norm{in.const_data_ptr(),
                                w.const_data_ptr(),
                                b.const_data_ptr(),
                                residual ? r.const_data_ptr() : nullptr,
                                scale ? s.const_data_ptr() : nullptr,
                                addend == nullptr ? nullptr : addend->const_data_ptr(),
                                output.mutable_data_ptr(),
                                channels,
                                eps};
  torch::stable::parallel_for(0, in.numel() / channels, 1 + 16384 / channels,
                              [&](int64_t begin, int64_t end) { kernels.layer_norm(norm, begin, end); });
}

}  // namespace

Tensor layer_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, double eps,
                  const OptionalTensor& residual, const OptionalTensor& scale) {
  const std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  Tensor output = torch::stable::new_empty(input, shape);
  normalize(output, input, weight, bias, eps, residual, scale);
  return output;
}

void add_layer_norm_(const Tensor& residual, const Tensor& input, const Tensor& weight, const Tensor& bias, double eps,
                     const OptionalTensor& scale) {
  STD_TORCH_CHECK(residual.is_contiguous(), "internimage::add_layer_norm_: residual must be contiguous");
  normalize(residual, input, weight, bias, eps, residual, scale);
}

Tensor norm_of_sum_(const Tensor& input, const Tensor& addend, const Tensor& weight, const Tensor& bias, double eps) {
  STD_TORCH_CHECK(input.is_contiguous(), "internimage::norm_of_sum_: input must be contiguous");
  STD_TORCH_CHECK(addend.scalar_type() == input.scalar_type() && same_sizes(addend, input),
                  "internimage::norm_of_sum_: addend must have input's shape and dtype");
  const std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  const Tensor output = torch::stable::new_empty(input, shape), other = dense(addend);
  normalize(output, input, weight, bias, eps, std::nullopt, std::nullopt, &other);
  return output;
}

}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  m.impl("layer_norm", INTERNIMAGE_BOX(&internimage::layer_norm));
  m.impl("add_layer_norm_", INTERNIMAGE_BOX(&internimage::add_layer_norm_));
  m.impl("norm_of_sum_", INTERNIMAGE_BOX(&internimage::norm_of_sum_));
}
