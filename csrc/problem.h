// SPDX-License-Identifier: MIT
// Checks the arguments of operators that gather and makes a Problem of them, for every device. LibTorch stable ABI
// only.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"

namespace internimage {

constexpr int64_t kLargest = int64_t(1) << 30;  // products of two smaller values, and their sums, fit 64 bits

// 0 if the kernel does not fit. A negative quotient would be rounded up to 0 and count as one output.
inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t steps = size + 2 * pad - dilation * (kernel - 1) - 1;
  return steps < 0 ? 0 : steps / stride + 1;
}

inline bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.device() == b.device();
}

// Of `operator_name`, with the tensors' numbers dense and in DCNv3's order. A direct call of torch.ops.internimage
// bypasses the checks in Python, and the kernels would read out of bounds.
inline Problem make_problem(const char* operator_name, const torch::stable::Tensor& input,
                            const torch::stable::Tensor& offset, const torch::stable::Tensor& mask,
                            const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                            double offset_scale, bool remove_center, bool softmax) {
  STD_TORCH_CHECK(input.dim() == 4 && offset.dim() == 4 && mask.dim() == 4, "internimage::", operator_name,
                  ": input, offset and mask must have 4 dimensions");
  // one tensor on a device is enough for the dispatcher to choose its kernel
  STD_TORCH_CHECK(same_device(input, offset) && same_device(input, mask), "internimage::", operator_name,
                  ": input, offset and mask must be on one device");
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "internimage::", operator_name, ": kernel_size, stride, padding and dilation must be pairs");
  Problem p;
  p.batch = input.size(0);
  p.height = input.size(1);
  p.width = input.size(2);
  p.channels = input.size(3);
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0, "internimage::", operator_name,
                  ": groups must divide the channels");
  STD_TORCH_CHECK(
      p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 && p.dilation_w > 0,
      "internimage::", operator_name, ": kernel_size, stride and dilation must be positive");
  STD_TORCH_CHECK(p.pad_h >= 0 && p.pad_w >= 0, "internimage::", operator_name, ": padding must not be negative");
  for (const auto* pair : {&kernel, &stride, &padding, &dilation})
    for (const int64_t value : *pair)
      STD_TORCH_CHECK(value < kLargest, "internimage::", operator_name,
                      ": kernel_size, stride, padding and dilation must be below 2^30");
  STD_TORCH_CHECK(std::isfinite(offset_scale), "internimage::", operator_name, ": offset_scale must be finite");
  p.groups = groups;
  p.group_channels = p.channels / groups;
  p.points = p.kernel_h * p.kernel_w - (remove_center ? 1 : 0);
  p.mask = p.grad_mask = {groups * p.points, p.points};
  p.offset = p.grad_offset = {2 * groups * p.points, 2 * p.points};
  p.row_major = p.y_first = false;
  p.out_height = output_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
  p.out_width = output_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  p.offset_scale = offset_scale;
  p.remove_center = remove_center;
  p.softmax = softmax;
  STD_TORCH_CHECK(p.points > 0 && p.out_height > 0 && p.out_width > 0, "internimage::", operator_name,
                  ": the kernel does not fit the input");
  const bool fits = offset.size(0) == p.batch && offset.size(1) == p.out_height && offset.size(2) == p.out_width &&
                    offset.size(3) == groups * p.points * 2 && mask.size(0) == p.batch &&
                    mask.size(1) == p.out_height && mask.size(2) == p.out_width && mask.size(3) == groups * p.points;
  STD_TORCH_CHECK(fits, "internimage::", operator_name,
                  ": offset or mask does not have the shape that input and kernel ask for");
  STD_TORCH_CHECK(input.scalar_type() == offset.scalar_type() && input.scalar_type() == mask.scalar_type(),
                  "internimage::", operator_name, ": input, offset and mask must have one dtype");
  return p;
}

// Checks what the backward takes besides; grad_output has `channels` numbers for each output pixel.
inline void check_backward(const char* operator_name, const Problem& p, int64_t channels,
                           const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
                           const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(grad_output.dim() == 4 && grad_output.size(0) == p.batch && grad_output.size(1) == p.out_height &&
                      grad_output.size(2) == p.out_width && grad_output.size(3) == channels,
                  "internimage::", operator_name, "_backward: grad_output must have the output's shape");
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "internimage::", operator_name,
                  "_backward: grad_output must have input's dtype");
  STD_TORCH_CHECK(same_device(grad_output, input), "internimage::", operator_name,
                  "_backward: grad_output must be on the device of input");
  STD_TORCH_CHECK(output_mask.size() == 3, "internimage::", operator_name,
                  "_backward: output_mask must have 3 entries");
}

}  // namespace internimage
