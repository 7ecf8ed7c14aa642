// SPDX-License-Identifier: MIT
// Registration of DCNv3's query on the CPU. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../../boxed.h"
#include "../../dense.h"
#include "../../problem.h"
#include "../isa/dispatch.h"
#include "../isa/kernel_table.h"
#include "../operators.h"
#include "../scratch.h"
#include "arguments.h"

namespace internimage {
using torch::stable::Tensor;

Tensor query(const Tensor& input, const Tensor& conv_weight, const std::optional<Tensor>& conv_bias,
             const Tensor& norm_weight, const Tensor& norm_bias, std::vector<int64_t> stride,
             std::vector<int64_t> padding, double eps) {
  const auto is_row = [&](const Tensor& t) {
    return t.dim() == 1 && t.size(0) == input.size(3) && t.scalar_type() == input.scalar_type();
  };
  STD_TORCH_CHECK(input.dim() == 4 && input.size(3) > 0, "internimage::query: input must be (N, H, W, C)");
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(0) == input.size(3) && conv_weight.size(1) == 1 &&
                      conv_weight.scalar_type() == input.scalar_type(),
                  "internimage::query: conv_weight must be (C, 1, height, width) in input's dtype");
  STD_TORCH_CHECK(is_row(norm_weight) && is_row(norm_bias) && (!conv_bias || is_row(*conv_bias)),
                  "internimage::query: biases and norm_weight must be vectors of C in input's dtype");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2, "internimage::query: stride and padding must be pairs");
  QueryArguments q;
  const int64_t batch = input.size(0);
  q.height = input.size(1);
  q.width = input.size(2);
  q.channels = input.size(3);
  q.kernel_h = conv_weight.size(2);
  q.kernel_w = conv_weight.size(3);
  q.stride_h = stride[0];
  q.stride_w = stride[1];
  q.pad_h = padding[0];
  q.pad_w = padding[1];
  const bool valid = q.kernel_h > 0 && q.kernel_w > 0 && q.stride_h > 0 && q.stride_w > 0 && q.pad_h >= 0 &&
                     q.pad_w >= 0 && q.stride_h < kLargest && q.stride_w < kLargest && q.pad_h < kLargest &&
                     q.pad_w < kLargest;
  STD_TORCH_CHECK(valid, "internimage::query: kernel, stride or padding is out of range");
  q.out_height = output_size(q.height, q.kernel_h, q.stride_h, q.pad_h, 1);
  q.out_width = output_size(q.width, q.kernel_w, q.stride_w, q.pad_w, 1);
  STD_TORCH_CHECK(q.out_height > 0 && q.out_width > 0, "internimage::query: the kernel does not fit the input");
  q.eps = eps;
  const Kernels& kernels = kernels_of(input.scalar_type());
  const Tensor in = dense(input), weight = dense(conv_weight), bias = dense(conv_bias ? *conv_bias : norm_bias),
               gamma = dense(norm_weight), beta = dense(norm_bias);
  Tensor output = torch::stable::new_empty(input, {batch, q.out_height, q.out_width, q.channels});
  if (output.numel() == 0) return output;
  q.input = in.const_data_ptr();
  q.conv_weight = weight.const_data_ptr();
  q.conv_bias = conv_bias ? bias.const_data_ptr() : nullptr;
  q.norm_weight = gamma.const_data_ptr();
  q.norm_bias = beta.const_data_ptr();
  q.output = output.mutable_data_ptr();
  // the taps are transposed once per task, which a few rows must outweigh
  const int64_t grain = 1 + 32768 / (q.out_width * q.channels);
  parallel_with_scratch(batch * q.out_height, grain, kernels.query_scratch(q),
                        [&](void* scratch, int64_t begin, int64_t end) { kernels.query(q, scratch, begin, end); });
  return output;
}

}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) { m.impl("query", INTERNIMAGE_BOX(&internimage::query)); }
