// SPDX-License-Identifier: MIT
// Registration of GELU on the CPU. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../../boxed.h"
#include "../../dense.h"
#include "../isa/dispatch.h"
#include "../isa/kernel_table.h"
#include "../operators.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

// Writes to `output`, which may be the input; both are contiguous.
void run(const Tensor& input, const Tensor& output) {
  const Kernels& kernels = kernels_of(input.scalar_type());
  const void* from = input.const_data_ptr();
  void* to = output.mutable_data_ptr();
  torch::stable::parallel_for(0, input.numel(), 16384,
                              [&](int64_t begin, int64_t end) { kernels.gelu(from, to, begin, end); });
}

Tensor gelu(const Tensor& input) {
  const Tensor in = dense(input);
  const Tensor output = torch::stable::empty_like(in);
  run(in, output);
  return output;
}

}  // namespace

void gelu_(const Tensor& input) {
  STD_TORCH_CHECK(input.is_contiguous(), "internimage::gelu_: input must be contiguous");
  run(input, input);
}

namespace {

Tensor gelu_backward(const Tensor& grad_output, const Tensor& input) {
  STD_TORCH_CHECK(same_sizes(grad_output, input) && grad_output.scalar_type() == input.scalar_type(),
                  "internimage::gelu_backward: grad_output must have input's shape and dtype");
  const Kernels& kernels = kernels_of(input.scalar_type());
  const Tensor grad = dense(grad_output), in = dense(input);
  const Tensor output = torch::stable::empty_like(in);
  const void *from_grad = grad.const_data_ptr(), *from = in.const_data_ptr();
  void* to = output.mutable_data_ptr();
  torch::stable::parallel_for(0, in.numel(), 16384, [&](int64_t begin, int64_t end) {
    kernels.gelu_backward(from_grad, from, to, begin, end);
  });
  return output;
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  m.impl("gelu", INTERNIMAGE_BOX(&internimage::gelu));
  m.impl("gelu_backward", INTERNIMAGE_BOX(&internimage::gelu_backward));
  m.impl("gelu_", INTERNIMAGE_BOX(&internimage::gelu_));
}
