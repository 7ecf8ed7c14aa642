// SPDX-License-Identifier: MIT
// Registration of DCNv3 on the CPU: checks, memory, threads. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../../boxed.h"
#include "../../common.h"
#include "../../dense.h"
#include "../../problem.h"
#include "../gather/plan.h"
#include "../isa/dispatch.h"
#include "../isa/kernel_table.h"
#include "../operators.h"
#include "../scratch.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

// Pixels of the padded image are indexed with 32 bits.
void check_size(const Problem& p) {
  STD_TORCH_CHECK((p.height + 3) * (p.width + 2) < std::numeric_limits<int32_t>::max(),
                  "internimage::dcnv3: an image of ", p.height, " x ", p.width, " pixels is too large");
}

// A tensor of pixels without gaps in a pixel, and the elements from one pixel to the next: `t`, which may be a part of
// the channels of another tensor, or a copy.
Tensor pixels_of(const Tensor& t, int64_t& stride) {
  const bool even = t.stride(3) == 1 && t.stride(2) >= t.size(3) && t.stride(1) == t.size(2) * t.stride(2) &&
                    t.stride(0) == t.size(1) * t.stride(1);
  stride = even ? t.stride(2) : t.size(3);
  return even ? t : dense(t);
}

}  // namespace

Tensor dcnv3(const Tensor& input, const Tensor& offset, const Tensor& mask, std::vector<int64_t> kernel_size,
             std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
             double offset_scale, bool remove_center, bool softmax) {
  Problem p = make_problem(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale,
                           remove_center, softmax);
  check_size(p);
  const Kernels& kernels = kernels_of(input.scalar_type());
  const std::vector<int64_t> shape = {p.batch, p.out_height, p.out_width, p.channels};
  if (input.numel() == 0) return torch::stable::new_zeros(input, shape);  // only padding is sampled
  Tensor output = torch::stable::new_empty(input, shape);
  const Tensor in = dense(input), off = pixels_of(offset, p.offset_stride), m = pixels_of(mask, p.mask_stride);
  const void *in_data = in.const_data_ptr(), *off_data = off.const_data_ptr(), *m_data = m.const_data_ptr();
  void* out_data = output.mutable_data_ptr();
  const Plan plan = kernels.plan_forward(p);
  const int64_t task_cost = p.batch * p.out_height * p.out_width * p.channels * p.points / plan.tasks;
  parallel_with_scratch(plan.tasks, 1 + 32768 / (1 + task_cost), plan.scratch_bytes,
                        [&](void* scratch, int64_t begin, int64_t end) {
                          kernels.forward(p, in_data, off_data, m_data, out_data, scratch, begin, end);
                        });
  return output;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                  const Tensor& mask, std::vector<int64_t> kernel_size,
                                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                  std::vector<int64_t> dilation, int64_t groups, double offset_scale,
                                                  bool remove_center, bool softmax, bool /* deterministic: always */,
                                                  std::vector<bool> output_mask) {
  const Problem p = make_problem(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale,
                                 remove_center, softmax);
  check_size(p);
  check_backward(p, grad_output, input, output_mask);
  const Kernels& kernels = kernels_of(input.scalar_type());
  const bool want_input = output_mask[0], want_points = output_mask[1] || output_mask[2];
  const bool is_empty = input.numel() == 0;  // only padding is sampled, and no gradient depends on it
  const auto new_grad = [&](const Tensor& t, bool wanted) {
    const auto shape = wanted ? std::vector<int64_t>(t.sizes().begin(), t.sizes().end()) : std::vector<int64_t>{0};
    return is_empty ? torch::stable::new_zeros(input, shape) : torch::stable::new_empty(input, shape);
  };
  Tensor grad_input = new_grad(input, want_input), grad_offset = new_grad(offset, want_points),
         grad_mask = new_grad(mask, want_points);
  if (!is_empty && (want_input || want_points)) {
    const Tensor grad = dense(grad_output), in = dense(input), off = dense(offset), m = dense(mask);
    const void *grad_data = grad.const_data_ptr(), *in_data = in.const_data_ptr(), *off_data = off.const_data_ptr(),
               *m_data = m.const_data_ptr();
    void* to_input = want_input ? grad_input.mutable_data_ptr() : nullptr;
    void* to_offset = want_points ? grad_offset.mutable_data_ptr() : nullptr;
    void* to_mask = want_points ? grad_mask.mutable_data_ptr() : nullptr;
    const int64_t threads = torch::stable::get_num_threads();
    const Plan plan = kernels.plan_backward(p, threads);
    parallel_with_scratch(plan.tasks, 1, plan.scratch_bytes, [&](void* scratch, int64_t begin, int64_t end) {
      kernels.backward(p, threads, grad_data, in_data, off_data, m_data, to_input, to_offset, to_mask, scratch, begin,
                       end);
    });
  }
  if (!output_mask[1]) grad_offset = new_grad(offset, false);
  if (!output_mask[2]) grad_mask = new_grad(mask, false);
  return {grad_input, grad_offset, grad_mask};
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  m.impl("dcnv3", INTERNIMAGE_BOX(&internimage::dcnv3));
  m.impl("dcnv3_backward", INTERNIMAGE_BOX(&internimage::dcnv3_backward));
}
