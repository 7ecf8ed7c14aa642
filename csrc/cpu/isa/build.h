// SPDX-License-Identifier: MIT
// All kernels of one instruction set.
//
// Included by each source of this folder, which sets the compiler's target and defines what simd/target.h lists. No
// kernel may instantiate a template of the C++ library: it would be compiled for this instruction set, and the linker
// could keep that copy for all callers.
#pragma once

#include "../block/sum.h"
#include "../gather/kernels.h"
#include "../gelu/gelu.h"
#include "../layer_norm/layer_norm.h"
#include "../query/query.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "kernel_table.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

template <typename S, typename T>
constexpr Kernels kKernels = {plan_forward<S, T>,        forward<S, T, false>, forward<S, T, true>, plan_backward<S, T>,
                              backward<S, T, false>,     backward<S, T, true>, layer_norm<S, T>,    gelu_range<S, T>,
                              gelu_backward_range<S, T>, scaled_sum<S, T>,     query_scratch<T>,    query<S, T>};

}  // namespace INTERNIMAGE_ISA

extern const CpuBuild INTERNIMAGE_BUILD = {
    INTERNIMAGE_NAME,
    INTERNIMAGE_ISA::kKernels<float, float>,
    INTERNIMAGE_ISA::kKernels<double, double>,
    INTERNIMAGE_ISA::kKernels<INTERNIMAGE_ISA::Bf16, float>,
    INTERNIMAGE_ISA::kKernels<INTERNIMAGE_ISA::Fp16, float>,
};

}  // namespace internimage
