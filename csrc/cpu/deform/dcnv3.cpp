// SPDX-License-Identifier: MIT
// Registration of DCNv3 on the CPU. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "../../boxed.h"
#include "../../problem.h"
#include "../operators.h"
#include "run.h"

namespace internimage {

using torch::stable::Tensor;

Tensor dcnv3(const Tensor& input, const Tensor& offset, const Tensor& mask, std::vector<int64_t> kernel_size,
             std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
             double offset_scale, bool remove_center, bool softmax) {
  return run_forward("dcnv3",
                     make_problem("dcnv3", input, offset, mask, kernel_size, stride, padding, dilation, groups,
                                  offset_scale, remove_center, softmax),
                     Samples::kSum, input, offset, mask);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                  const Tensor& mask, std::vector<int64_t> kernel_size,
                                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                  std::vector<int64_t> dilation, int64_t groups, double offset_scale,
                                                  bool remove_center, bool softmax, bool /* deterministic: always */,
                                                  std::vector<bool> output_mask) {
  return run_backward("dcnv3",
                      make_problem("dcnv3", input, offset, mask, kernel_size, stride, padding, dilation, groups,
                                   offset_scale, remove_center, softmax),
                      Samples::kSum, grad_output, input, offset, mask, output_mask);
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  m.impl("dcnv3", INTERNIMAGE_BOX(&internimage::dcnv3));
  m.impl("dcnv3_backward", INTERNIMAGE_BOX(&internimage::dcnv3_backward));
}
