// SPDX-License-Identifier: MIT
// The kernels of each instruction set, as the registration sees them.
#pragma once

#include "../common.h"

namespace internimage {

// Shape of the kernels for storage type S and compute type T.
template <typename S, typename T>
struct Kernels {
  void (*forward)(const Problem&, const S* input, const S* offset, const S* mask, S* output, const S* zeros,
                  void* scratch, int64_t begin_row, int64_t end_row);
  void (*backward)(const Problem&, const S* grad_output, const S* input, const S* offset, const S* mask, T* grad_input,
                   S* grad_offset, S* grad_mask, const S* zeros, void* scratch, int64_t image, int64_t begin_group,
                   int64_t end_group, bool want_input, bool want_points);
};

struct CpuBuild {
  const char* name;
  Kernels<float, float> f32;
  Kernels<double, double> f64;
  Kernels<void, float> bf16;  // bfloat16 bits
  int64_t (*scratch_bytes)(const Problem&);  // for any strip of any of the kernels
};

extern const CpuBuild build_default;
#if defined(__x86_64__)
extern const CpuBuild build_avx2;
extern const CpuBuild build_avx512;
#endif

}  // namespace internimage
