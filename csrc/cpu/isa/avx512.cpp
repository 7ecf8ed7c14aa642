// SPDX-License-Identifier: MIT
// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
#include "kernel_table.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif
#define INTERNIMAGE_ISA isa_avx512
#define INTERNIMAGE_BUILD build_avx512
#define INTERNIMAGE_NAME "avx512"
#define INTERNIMAGE_VECTOR_BYTES 64
#include "build.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
