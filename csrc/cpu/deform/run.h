// SPDX-License-Identifier: MIT
// Operators that gather, by the kernels of this processor. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../../common.h"

namespace internimage {

// What an output pixel has of a unit: the sum of the samples of its points, or these samples, point by point.
enum class Samples { kSum, kColumns };

// `p` is of these tensors, whose layout is found here. Returns (N, Ho, Wo, C), or with kColumns (N, Ho, Wo, P * C).
torch::stable::Tensor run_forward(const char* operator_name, Problem p, Samples samples,
                                  const torch::stable::Tensor& input, const torch::stable::Tensor& offset,
                                  const torch::stable::Tensor& mask);

// The gradients of input, offset and mask; an empty one where output_mask is false.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> run_backward(
    const char* operator_name, Problem p, Samples samples, const torch::stable::Tensor& grad_output,
    const torch::stable::Tensor& input, const torch::stable::Tensor& offset, const torch::stable::Tensor& mask,
    const std::vector<bool>& output_mask);

}  // namespace internimage
