// SPDX-License-Identifier: MIT
// Registration of layer norm on the CPU. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "builds.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

Tensor layer_norm(const Tensor& input, const Tensor& weight, const Tensor& bias, double eps) {
  const auto is_row = [&](const Tensor& t) {
    return input.dim() > 0 && t.dim() == 1 && t.size(0) == input.size(input.dim() - 1) && t.size(0) > 0 &&
           t.scalar_type() == input.scalar_type();
  };
  STD_TORCH_CHECK(is_row(weight) && is_row(bias),
                  "internimage::layer_norm: weight and bias must be vectors of input's last size and of its dtype");
  const Kernels& kernels = kernels_of(input.scalar_type());
  const Tensor in = torch::stable::contiguous(input), w = torch::stable::contiguous(weight),
               b = torch::stable::contiguous(bias);
  Tensor output = torch::stable::empty_like(in);
  if (output.numel() == 0) return output;
  const void *in_data = in.const_data_ptr(), *w_data = w.const_data_ptr(), *b_data = b.const_data_ptr();
  void* out_data = output.mutable_data_ptr();
  const int64_t channels = w.size(0);
  torch::stable::parallel_for(0, in.numel() / channels, 1 + 16384 / channels, [&](int64_t begin, int64_t end) {
    kernels.layer_norm(in_data, w_data, b_data, out_data, channels, eps, begin, end);
  });
  return output;
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) { m.impl("layer_norm", TORCH_BOX(&internimage::layer_norm)); }
