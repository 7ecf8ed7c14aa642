// SPDX-License-Identifier: MIT
// Registration of the CPU kernels: checks, the choice of instruction set, memory, threads. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../problem.h"
#include "dcnv3_cpu.h"

namespace internimage {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The best build that this processor runs; INTERNIMAGE_CPU_CAPABILITY=default|avx2|avx512 lowers it.
const CpuBuild& choose_build() {
  int level = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
  if (const char* wish = std::getenv("INTERNIMAGE_CPU_CAPABILITY")) {
    if (std::strcmp(wish, "default") == 0) level = 0;
    if (std::strcmp(wish, "avx2") == 0 && level > 1) level = 1;
  }
  if (level == 2) return build_avx512;
  if (level == 1) return build_avx2;
#endif
  return build_default;
}

const CpuBuild& current_build() {
  static const CpuBuild& build = choose_build();
  return build;
}

// Places are kept in 32 bits: the pixels of an image with its padding.
void check_size(const Problem& p) {
  STD_TORCH_CHECK((p.height + 3) * (p.width + 2) < std::numeric_limits<int32_t>::max(),
                  "internimage::dcnv3: an image of ", p.height, " x ", p.width, " pixels is too large");
}

// Memory that is not set to anything.
std::unique_ptr<char[]> allocate(int64_t bytes) { return std::unique_ptr<char[]>(new char[bytes]); }

const Kernels& kernels_of(ScalarType dtype) {
  const CpuBuild& build = current_build();
  switch (dtype) {
    case ScalarType::Float:
      return build.float32;
    case ScalarType::Double:
      return build.float64;
    case ScalarType::BFloat16:
      return build.bfloat16;
    case ScalarType::Half:
      return build.float16;
    default:
      STD_TORCH_CHECK(false, "internimage::dcnv3: dtype must be float64, float32, bfloat16 or float16");
      __builtin_unreachable();
  }
}

Tensor dcnv3(const Tensor& input, const Tensor& offset, const Tensor& mask, std::vector<int64_t> kernel_size,
             std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
             double offset_scale, bool remove_center, bool softmax) {
  const Problem p = make_problem(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale,
                                 remove_center, softmax);
  check_size(p);
  const Kernels& kernels = kernels_of(input.scalar_type());
  Tensor output = torch::stable::new_empty(input, {p.batch, p.out_height, p.out_width, p.channels});
  if (output.numel() == 0) return output;
  const Tensor in = torch::stable::contiguous(input), off = torch::stable::contiguous(offset),
               m = torch::stable::contiguous(mask);
  const void *in_data = in.const_data_ptr(), *off_data = off.const_data_ptr(), *m_data = m.const_data_ptr();
  void* out_data = output.mutable_data_ptr();
  const Plan plan = kernels.plan_forward(p);
  const int64_t task_cost = p.batch * p.out_height * p.out_width * p.channels * p.points / plan.tasks;
  torch::stable::parallel_for(0, plan.tasks, 1 + 32768 / (1 + task_cost), [&](int64_t begin, int64_t end) {
    const auto scratch = allocate(plan.scratch_bytes);
    kernels.forward(p, in_data, off_data, m_data, out_data, scratch.get(), begin, end);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                                                  const Tensor& mask, std::vector<int64_t> kernel_size,
                                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                  std::vector<int64_t> dilation, int64_t groups, double offset_scale,
                                                  bool remove_center, bool softmax, bool /* deterministic: always */,
                                                  std::vector<bool> output_mask) {
  const Problem p = make_problem(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale,
                                 remove_center, softmax);
  check_size(p);
  STD_TORCH_CHECK(grad_output.dim() == 4 && grad_output.size(0) == p.batch && grad_output.size(1) == p.out_height &&
                      grad_output.size(2) == p.out_width && grad_output.size(3) == p.channels,
                  "internimage::dcnv3_backward: grad_output must have the output's shape");
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(),
                  "internimage::dcnv3_backward: grad_output must have input's dtype");
  STD_TORCH_CHECK(output_mask.size() == 3, "internimage::dcnv3_backward: output_mask must have 3 entries");
  const Kernels& kernels = kernels_of(input.scalar_type());
  const bool want_input = output_mask[0], want_points = output_mask[1] || output_mask[2];
  const auto like = [&](const Tensor& t, bool wanted) {
    return torch::stable::new_empty(
        input, wanted ? std::vector<int64_t>(t.sizes().begin(), t.sizes().end()) : std::vector<int64_t>{0});
  };
  Tensor grad_input = like(input, want_input), grad_offset = like(offset, want_points), grad_mask = like(mask, want_points);
  if (grad_output.numel() > 0 && (want_input || want_points)) {
    const Tensor grad = torch::stable::contiguous(grad_output), in = torch::stable::contiguous(input),
                 off = torch::stable::contiguous(offset), m = torch::stable::contiguous(mask);
    const void *grad_data = grad.const_data_ptr(), *in_data = in.const_data_ptr(), *off_data = off.const_data_ptr(),
               *m_data = m.const_data_ptr();
    void* to_input = want_input ? grad_input.mutable_data_ptr() : nullptr;
    void* to_offset = want_points ? grad_offset.mutable_data_ptr() : nullptr;
    void* to_mask = want_points ? grad_mask.mutable_data_ptr() : nullptr;
    const int64_t threads = torch::stable::get_num_threads();
    const Plan plan = kernels.plan_backward(p, threads);
    torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = allocate(plan.scratch_bytes);
      kernels.backward(p, threads, grad_data, in_data, off_data, m_data, to_input, to_offset, to_mask, scratch.get(),
                       begin, end);
    });
  }
  if (!output_mask[1]) grad_offset = like(offset, false);
  if (!output_mask[2]) grad_mask = like(mask, false);
  return {grad_input, grad_offset, grad_mask};
}

// Name of the instruction set in use, for `internimage info`.
std::string cpu_capability() { return current_build().name; }

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) {
  m.impl("dcnv3", TORCH_BOX(&internimage::dcnv3));
  m.impl("dcnv3_backward", TORCH_BOX(&internimage::dcnv3_backward));
}

STABLE_TORCH_LIBRARY_IMPL(internimage, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&internimage::cpu_capability));
}
