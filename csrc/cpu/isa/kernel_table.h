// SPDX-License-Identifier: MIT
// The kernels of each instruction set, as the registrations call them.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../gather/plan.h"
#include "../layer_norm/arguments.h"
#include "../query/arguments.h"

namespace internimage {

using ForwardKernel = void(const Problem&, const void* input, const void* offset, const void* mask, void* output,
                           void* scratch, int64_t begin, int64_t end);
using BackwardKernel = void(const Problem&, int64_t wanted_tasks, const void* grad_output, const void* input,
                            const void* offset, const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                            void* scratch, int64_t begin, int64_t end);

// The kernels of one dtype. Tensors are contiguous, but for the offsets and masks that a Problem describes.
struct Kernels {
  Plan (*plan_forward)(const Problem&);
  ForwardKernel *forward, *columns;  // the sum of the samples of each unit's points, or the samples
  // At least `wanted_tasks` tasks are made if there are enough groups; the results do not depend on it. grad_input may
  // be null, or both grad_offset and grad_mask.
  Plan (*plan_backward)(const Problem&, int64_t wanted_tasks);
  BackwardKernel *backward, *columns_backward;
  void (*layer_norm)(const LayerNormArguments&, int64_t begin_row, int64_t end_row);
  void (*gelu)(const void* input, void* output, int64_t begin, int64_t end);
  void (*gelu_backward)(const void* grad_output, const void* input, void* grad_input, int64_t begin, int64_t end);
  void (*scaled_sum)(const void* x, const void* y, const void* scale, void* output, int64_t channels, int64_t begin_row,
                     int64_t end_row);
  int64_t (*query_scratch)(const QueryArguments&);  // bytes
  void (*query)(const QueryArguments&, void* scratch, int64_t begin_row, int64_t end_row);
};

struct CpuBuild {
  const char* name;
  Kernels float32, float64, bfloat16, float16;
};

extern const CpuBuild build_default;
#if defined(__x86_64__)
extern const CpuBuild build_avx2;
extern const CpuBuild build_avx512;
#endif

}  // namespace internimage
