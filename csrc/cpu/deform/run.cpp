// SPDX-License-Identifier: MIT
// Operators that gather, by the kernels of this processor: layouts, memory, threads. LibTorch stable ABI only.
#include "run.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "../../common.h"
#include "../../dense.h"
#include "../../problem.h"
#include "../gather/plan.h"
#include "../isa/dispatch.h"
#include "../isa/kernel_table.h"
#include "../scratch.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

// Pixels of the padded image are indexed with 32 bits.
void check_size(const char* operator_name, const Problem& p) {
  STD_TORCH_CHECK((p.height + 3) * (p.width + 2) < std::numeric_limits<int32_t>::max(), "internimage::", operator_name,
                  ": an image of ", p.height, " x ", p.width, " pixels is too large");
}

// A tensor of pixels without gaps in a pixel, and the elements from one pixel to the next: `t`, which may be a part of
// the channels of another tensor or one pixel expanded to all, or a copy.
Tensor pixels_of(const Tensor& t, int64_t& stride) {
  const bool even = t.stride(3) == 1 && (t.stride(2) == 0 || t.stride(2) >= t.size(3)) &&
                    t.stride(1) == t.size(2) * t.stride(2) && t.stride(0) == t.size(1) * t.stride(1);
  stride = even ? t.stride(2) : t.size(3);
  return even ? t : dense(t);
}

int64_t output_channels(const Problem& p, Samples samples) {
  return samples == Samples::kColumns ? p.points * p.channels : p.channels;
}

}  // namespace

Tensor run_forward(const char* operator_name, Problem p, Samples samples, const Tensor& input, const Tensor& offset,
                   const Tensor& mask) {
  check_size(operator_name, p);
  const Kernels& kernels = kernels_of(input.scalar_type());
  const std::vector<int64_t> shape = {p.batch, p.out_height, p.out_width, output_channels(p, samples)};
  if (input.numel() == 0) return torch::stable::new_zeros(input, shape);  // only padding is sampled
  Tensor output = torch::stable::new_empty(input, shape);
  const Tensor in = dense(input), off = pixels_of(offset, p.offset.pixel), m = pixels_of(mask, p.mask.pixel);
  const void *in_data = in.const_data_ptr(), *off_data = off.const_data_ptr(), *m_data = m.const_data_ptr();
  void* out_data = output.mutable_data_ptr();
  ForwardKernel* const kernel = samples == Samples::kColumns ? kernels.columns : kernels.forward;
  const Plan plan = kernels.plan_forward(p);
  const int64_t task_cost = p.batch * p.out_height * p.out_width * p.channels * p.points / plan.tasks;
  parallel_with_scratch(plan.tasks, 1 + 32768 / (1 + task_cost), plan.scratch_bytes,
                        [&](void* scratch, int64_t begin, int64_t end) {
                          kernel(p, in_data, off_data, m_data, out_data, scratch, begin, end);
                        });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const char* operator_name, Problem p, Samples samples,
                                                const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                const Tensor& mask, const std::vector<bool>& output_mask) {
  check_size(operator_name, p);
  check_backward(operator_name, p, output_channels(p, samples), grad_output, input, output_mask);
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
    const Tensor grad = dense(grad_output), in = dense(input), off = pixels_of(offset, p.offset.pixel),
                 m = pixels_of(mask, p.mask.pixel);
    const void *grad_data = grad.const_data_ptr(), *in_data = in.const_data_ptr(), *off_data = off.const_data_ptr(),
               *m_data = m.const_data_ptr();
    void* to_input = want_input ? grad_input.mutable_data_ptr() : nullptr;
    void* to_offset = want_points ? grad_offset.mutable_data_ptr() : nullptr;
    void* to_mask = want_points ? grad_mask.mutable_data_ptr() : nullptr;
    BackwardKernel* const kernel = samples == Samples::kColumns ? kernels.columns_backward : kernels.backward;
    const int64_t threads = torch::stable::get_num_threads();
    const Plan plan = kernels.plan_backward(p, threads);
    parallel_with_scratch(plan.tasks, 1, plan.scratch_bytes, [&](void* scratch, int64_t begin, int64_t end) {
      kernel(p, threads, grad_data, in_data, off_data, m_data, to_input, to_offset, to_mask, scratch, begin, end);
    });
  }
  if (!output_mask[1]) grad_offset = new_grad(offset, false);
  if (!output_mask[2]) grad_mask = new_grad(mask, false);
  return {grad_input, grad_offset, grad_mask};
}

}  // namespace internimage
