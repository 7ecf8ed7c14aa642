// SPDX-License-Identifier: MIT
// Types in memory and in registers: wide loads, stores and atomic additions, and the conversions between the types.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#if __CUDA_ARCH__ >= 900
#define INTERNIMAGE_VECTOR_ATOMICS true
#else
#define INTERNIMAGE_VECTOR_ATOMICS false
#endif
#else  // the including file defines the CUDA names that are used here
#define INTERNIMAGE_VECTOR_ATOMICS true
#endif

namespace internimage {
namespace cuda {

// ---- storage types

// Conversions between storage type S and its compute type: single values, and N values in 32-bit words.
template <typename S>
struct Storage;

template <>
struct Storage<float> {
  static __device__ __forceinline__ float widen(float value) { return value; }
  static __device__ __forceinline__ float narrow(float value) { return value; }
  template <int N>
  static __device__ __forceinline__ void unpack(const uint32_t* words, float* values) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = __uint_as_float(words[i]);
  }
  template <int N>
  static __device__ __forceinline__ void pack(const float* values, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = __float_as_uint(values[i]);
  }
};

template <>
struct Storage<double> {
  static __device__ __forceinline__ double widen(double value) { return value; }
  static __device__ __forceinline__ double narrow(double value) { return value; }
  template <int N>
  static __device__ __forceinline__ void unpack(const uint32_t* words, double* values) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = __hiloint2double(words[2 * i + 1], words[2 * i]);
  }
  template <int N>
  static __device__ __forceinline__ void pack(const double* values, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      words[2 * i] = __double2loint(values[i]);
      words[2 * i + 1] = __double2hiint(values[i]);
    }
  }
};

template <>
struct Storage<__half> {
  static __device__ __forceinline__ float widen(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half narrow(float value) { return __float2half_rn(value); }
  template <int N>
  static __device__ __forceinline__ void unpack(const uint32_t* words, float* values) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i / 2]));
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  }
  template <int N>
  static __device__ __forceinline__ void pack(const float* values, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < N; i += 2)
      reinterpret_cast<__half2&>(words[i / 2]) = __floats2half2_rn(values[i], values[i + 1]);
  }
};

template <>
struct Storage<__nv_bfloat16> {
  static __device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
  template <int N>
  static __device__ __forceinline__ void unpack(const uint32_t* words, float* values) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      values[i] = __uint_as_float(words[i / 2] << 16);
      values[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  }
  template <int N>
  static __device__ __forceinline__ void pack(const float* values, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < N; i += 2)
      reinterpret_cast<__nv_bfloat162&>(words[i / 2]) = __floats2bfloat162_rn(values[i], values[i + 1]);
  }
};

// Loads N adjacent values. If N > 1, they must be aligned to their total size, or to 16 bytes if that is more.
template <typename S, int N>
__device__ __forceinline__ void load(const S* from, Compute<S> (&to)[N]) {
  constexpr int kBytes = N * sizeof(S);
  if constexpr (N == 1) {
    to[0] = Storage<S>::widen(__ldg(from));
  } else {
    uint32_t words[kBytes / 4];
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(from) + i);
        words[4 * i] = w.x;
        words[4 * i + 1] = w.y;
        words[4 * i + 2] = w.z;
        words[4 * i + 3] = w.w;
      }
    } else if constexpr (kBytes == 8) {
      const uint2 w = __ldg(reinterpret_cast<const uint2*>(from));
      words[0] = w.x;
      words[1] = w.y;
    } else {
      static_assert(kBytes == 4, "no such load");
      words[0] = __ldg(reinterpret_cast<const unsigned int*>(from));
    }
    Storage<S>::template unpack<N>(words, to);
  }
}

template <typename S, int N>
__device__ __forceinline__ void store(S* to, const Compute<S> (&values)[N]) {
  constexpr int kBytes = N * sizeof(S);
  if constexpr (N == 1) {
    *to = Storage<S>::narrow(values[0]);
  } else {
    uint32_t words[kBytes / 4];
    Storage<S>::template pack<N>(values, words);
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i)  // an intrinsic, as the compiler may split an assignment
        __stwb(reinterpret_cast<uint4*>(to) + i,
               make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      static_assert(kBytes == 4, "no such store");
      *reinterpret_cast<unsigned int*>(to) = words[0];
    }
  }
}

// Adds atomically. From compute capability 9.0 on, four floats take one instruction.
template <typename T, int N>
__device__ __forceinline__ void atomic_add(T* to, const T (&values)[N]) {
  if constexpr (INTERNIMAGE_VECTOR_ATOMICS && std::is_same<T, float>::value && N == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(to + i, values[i]);
  }
}

// ---- registers

// The same value, kept in a register. Otherwise the compiler may convert it again for each use.
__device__ __forceinline__ void keep(float& value) {
#ifdef __CUDA_ARCH__
  asm("" : "+f"(value));
#else
  (void)value;
#endif
}

// The same pointer to global memory, computed here and kept in a register. Otherwise the compiler recomputes it from
// its terms for each access: six instructions instead of one.
template <typename T>
__device__ __forceinline__ T* materialize(T* pointer) {
#ifdef __CUDA_ARCH__
  // converted back below, or the compiler no longer knows that the memory is global
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
#else
  return pointer;
#endif
}

// The other half of 32 aligned bytes, without touching the upper word of the address.
template <typename S>
__device__ __forceinline__ const S* other_half(const S* pointer) {
#ifdef __CUDA_ARCH__
  const S* other;
  asm("{ .reg .b32 low, high; mov.b64 {low, high}, %1; xor.b32 low, low, 16; mov.b64 %0, {low, high}; }"
      : "=l"(other)
      : "l"(pointer));
  return other;
#else
  return reinterpret_cast<const S*>(reinterpret_cast<uintptr_t>(pointer) ^ 16);
#endif
}

// ---- math

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float inverse(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double inverse(double x) { return 1.0 / x; }

}  // namespace cuda
}  // namespace internimage
