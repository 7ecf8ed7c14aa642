// SPDX-License-Identifier: MIT
// Operators of the CPU as functions, for an operator that consists of others. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace internimage {

torch::stable::Tensor dcnv3(const torch::stable::Tensor& input, const torch::stable::Tensor& offset,
                            const torch::stable::Tensor& mask, std::vector<int64_t> kernel_size,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                            int64_t groups, double offset_scale, bool remove_center, bool softmax);

torch::stable::Tensor query(const torch::stable::Tensor& input, const torch::stable::Tensor& conv_weight,
                            const std::optional<torch::stable::Tensor>& conv_bias,
                            const torch::stable::Tensor& norm_weight, const torch::stable::Tensor& norm_bias,
                            std::vector<int64_t> stride, std::vector<int64_t> padding, double eps);

void gelu_(const torch::stable::Tensor& input);

torch::stable::Tensor layer_norm(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                 const torch::stable::Tensor& bias, double eps,
                                 const std::optional<torch::stable::Tensor>& residual,
                                 const std::optional<torch::stable::Tensor>& scale);

void add_layer_norm_(const torch::stable::Tensor& residual, const torch::stable::Tensor& input,
                     const torch::stable::Tensor& weight, const torch::stable::Tensor& bias, double eps,
                     const std::optional<torch::stable::Tensor>& scale);

torch::stable::Tensor norm_of_sum_(const torch::stable::Tensor& input, const torch::stable::Tensor& addend,
                                   const torch::stable::Tensor& weight, const torch::stable::Tensor& bias, double eps);

}  // namespace internimage
