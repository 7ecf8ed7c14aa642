// SPDX-License-Identifier: MIT
// The kernels of each instruction set, as the registration sees them.
#pragma once

#include "../common.h"

namespace internimage {

// A pass as a row of tasks: any ranges of them may be run at once, each with scratch memory of its own.
struct Plan {
  int64_t tasks, scratch_bytes;
};

// output = residual + scale * (layer norm of input), in rows of `channels` numbers; residual and scale may be null.
struct NormArguments {
  const void *input, *weight, *bias, *residual, *scale;
  void* output;
  int64_t channels;
  double eps;
};

// The kernels of one dtype. Tensors are contiguous.
struct Kernels {
  Plan (*plan_forward)(const Problem&);
  void (*forward)(const Problem&, const void* input, const void* offset, const void* mask, void* output, void* scratch,
                  int64_t begin, int64_t end);
  // `wanted_tasks` are made if there are so many groups; the results do not depend on it. A gradient may be null:
  // grad_input, or grad_offset and grad_mask.
  Plan (*plan_backward)(const Problem&, int64_t wanted_tasks);
  void (*backward)(const Problem&, int64_t wanted_tasks, const void* grad_output, const void* input, const void* offset,
                   const void* mask, void* grad_input, void* grad_offset, void* grad_mask, void* scratch, int64_t begin,
                   int64_t end);
  void (*layer_norm)(const NormArguments&, int64_t begin_row, int64_t end_row);
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
