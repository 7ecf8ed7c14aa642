// SPDX-License-Identifier: MIT
// Products of small matrices by a warp, on tensor cores: mma.sync of PTX, for half types from compute capability 8.0
// on.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#if __CUDA_ARCH__ >= 800
#define INTERNIMAGE_MMA true
#else
#define INTERNIMAGE_MMA false
#endif
#else  // the including file defines the CUDA names that are used here, and `emulate_mma`
#define INTERNIMAGE_MMA true
#endif

namespace internimage {
namespace cuda {

// sums += a * b for a of 16 x 16, b of 16 x 8 and sums of 16 x 8. All threads of the warp must call it. A matrix is
// spread over the threads: with row r = lane / 4 and pair c = lane % 4, according to the PTX ISA (m16n8k16),
//
//   a[0], a[1], a[2], a[3]    columns 2c and 2c + 1 of row r, of row r + 8, and columns 2c + 8 and 2c + 9 of these rows
//   b[0], b[1]                rows 2c and 2c + 1 of column r, and rows 2c + 8 and 2c + 9 of it
//   sums[0], ..., sums[3]     columns 2c and 2c + 1 of row r, and of row r + 8
//
// where a word has two values of S, the first one in its lower half. Products are exact. Sums are in float32, in an
// order that is not specified, and the hardware may cut off bits where float32 would round.
template <typename S>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(__CUDACC__)
#if INTERNIMAGE_MMA
#define INTERNIMAGE_MMA_ASM(type)                                                                              \
  float d[4]; /* not `sums` as operands of both: zeros there would be moved to registers */                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                          \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                      \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(sums[0]), "f"(sums[1]), \
                 "f"(sums[2]), "f"(sums[3]));                                                                  \
  for (int i = 0; i < 4; ++i) sums[i] = d[i]
#else
#define INTERNIMAGE_MMA_ASM(type) static_cast<void>(0)
#endif
template <>
__device__ __forceinline__ void mma<__half>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  INTERNIMAGE_MMA_ASM("f16");
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  INTERNIMAGE_MMA_ASM("bf16");
}
#else
template <typename S>
void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma<S>(sums, a, b);
}
#endif

}  // namespace cuda
}  // namespace internimage
