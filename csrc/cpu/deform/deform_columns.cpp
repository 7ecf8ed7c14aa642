// SPDX-License-Identifier: MIT
// Registration of the columns of deformable convolution v1 and v2 on the CPU. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "../../boxed.h"
#include "../../common.h"
#include "../../problem.h"
#include "run.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

Problem columns_problem(const Tensor& input, const Tensor& offset, const Tensor& mask,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        int64_t offset_groups) {
  Problem p = make_problem("deform_columns", input, offset, mask, kernel_size, stride, padding, dilation, offset_groups,
                           1.0, false, false);
  p.row_major = p.y_first = true;
  return p;
}

Tensor deform_columns(const Tensor& input, const Tensor& offset, const Tensor& mask, std::vector<int64_t> kernel_size,
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      int64_t offset_groups) {
  return run_forward("deform_columns",
                     columns_problem(input, offset, mask, kernel_size, stride, padding, dilation, offset_groups),
                     Samples::kColumns, input, offset, mask);
}

std::tuple<Tensor, Tensor, Tensor> deform_columns_backward(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& offset, const Tensor& mask,
                                                           std::vector<int64_t> kernel_size,
                                                           std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                           std::vector<int64_t> dilation, int64_t offset_groups,
                                                           bool /* deterministic: always */,
                                                           std::vector<bool> output_mask) {
  return run_backward("deform_columns",
                      columns_problem(input, offset, mask, kernel_size, stride, padding, dilation, offset_groups),
                      Samples::kColumns, grad_output, input, offset, mask, output_mask);
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  m.impl("deform_columns", INTERNIMAGE_BOX(&internimage::deform_columns));
  m.impl("deform_columns_backward", INTERNIMAGE_BOX(&internimage::deform_columns_backward));
}
