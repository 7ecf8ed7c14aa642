// SPDX-License-Identifier: MIT
// Conversions between the storage type S, in memory, and the compute type T, in registers.
#pragma once

#include <cstdint>

#include "target.h"
#include "vector.h"

// GCC splits the vector extensions' conversions between 16-bit and 32-bit integers into halves of a register, which
// takes five instructions instead of one. Not by the compiler's own macros (__AVX2__), which GCC defines too late.
#if defined(__x86_64__) && !defined(__clang__) && INTERNIMAGE_VECTOR_BYTES >= 32
#include <immintrin.h>
#define INTERNIMAGE_X86_CONVERSIONS INTERNIMAGE_VECTOR_BYTES
#else
#define INTERNIMAGE_X86_CONVERSIONS 0
#endif

namespace internimage {
namespace INTERNIMAGE_ISA {

// The half types in memory: distinct types, not to be confused with uint16_t.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Storage types with kernels specialized for the shapes of InternImage; the others use the generic ones, to keep the
// binary small.
template <typename S>
constexpr bool kIsSpecialized = false;
template <>
constexpr bool kIsSpecialized<float> = true;
template <>
constexpr bool kIsSpecialized<Bf16> = true;

// 16-bit integers -> 32-bit ones, and back without the upper halves.
template <int N>
INTERNIMAGE_INLINE Vector<uint32_t, N> widened(Vector<uint16_t, N> v) {
#if INTERNIMAGE_X86_CONVERSIONS == 64
  if constexpr (N == 16) return (Vector<uint32_t, N>)_mm512_cvtepu16_epi32((__m256i)v);
#endif
#if INTERNIMAGE_X86_CONVERSIONS
  if constexpr (N == 8) return (Vector<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)v);
#endif
  return __builtin_convertvector(v, Vector<uint32_t, N>);
}

template <int N>
INTERNIMAGE_INLINE Vector<uint16_t, N> narrowed(Vector<uint32_t, N> v) {
#if INTERNIMAGE_X86_CONVERSIONS == 64
  if constexpr (N == 16) return (Vector<uint16_t, N>)_mm512_cvtepi32_epi16((__m512i)v);
  if constexpr (N == 8) return (Vector<uint16_t, N>)_mm256_cvtepi32_epi16((__m256i)v);
#endif
  return __builtin_convertvector(v, Vector<uint16_t, N>);
}

// Storage S <-> compute type T, N lanes at a time.
//
// load_two and store_two take 2N adjacent elements, in an order of the type's own: for work that treats elements alike.
template <typename S, typename T, int N>
struct Convert {
  static INTERNIMAGE_INLINE void load_two(const S* from, Vector<T, N>& a, Vector<T, N>& b) {
    a = load(from);
    b = load(from + N);
  }
  static INTERNIMAGE_INLINE void store_two(S* to, Vector<T, N> a, Vector<T, N> b) {
    store(to, a);
    store(to + N, b);
  }
  static INTERNIMAGE_INLINE Vector<T, N> load(const S* from) { return INTERNIMAGE_ISA::load<Vector<T, N>>(from); }
  static INTERNIMAGE_INLINE void store(S* to, Vector<T, N> v) { INTERNIMAGE_ISA::store(to, v); }
};

template <int N>
struct Convert<Bf16, float, N> {
  static INTERNIMAGE_INLINE Vector<float, N> load(const Bf16* from) {
    return (Vector<float, N>)(widened<N>(INTERNIMAGE_ISA::load<Vector<uint16_t, N>>(from)) << 16);
  }
  // the even elements, and the odd ones: in the lower and upper halves of 32-bit integers
  static INTERNIMAGE_INLINE void load_two(const Bf16* from, Vector<float, N>& a, Vector<float, N>& b) {
    const auto both = INTERNIMAGE_ISA::load<Vector<uint32_t, N>>(from);
    a = (Vector<float, N>)(both << 16);
    b = (Vector<float, N>)(both & 0xffff0000);
  }
  static INTERNIMAGE_INLINE void store_two(Bf16* to, Vector<float, N> a, Vector<float, N> b) {
    INTERNIMAGE_ISA::store(to, (rounded(a) >> 16) | (rounded(b) & 0xffff0000));
  }
  static INTERNIMAGE_INLINE void store(Bf16* to, Vector<float, N> v) {
    INTERNIMAGE_ISA::store(to, narrowed<N>(rounded(v) >> 16));
  }
  static INTERNIMAGE_INLINE Vector<uint32_t, N> rounded(Vector<float, N> v) {  // the upper halves are the result
    // Rounds to nearest even. NaN needs no special case: it comes from a Bf16 or from the processor, so its lower half
    // is zero, and the addition does not carry into the upper half.
    const auto bits = (Vector<uint32_t, N>)v;
    return bits + (0x7fff + ((bits >> 16) & 1));
  }
};

template <int N>
struct Convert<Fp16, float, N> {
  using F = Vector<float, N>;
  using U = Vector<uint32_t, N>;
  static INTERNIMAGE_INLINE void load_two(const Fp16* from, F& a, F& b) {
    a = load(from);
    b = load(from + N);
  }
  static INTERNIMAGE_INLINE void store_two(Fp16* to, F a, F b) {
    store(to, a);
    store(to + N, b);
  }
  static INTERNIMAGE_INLINE F load(const Fp16* from) {
    const U bits = widened<N>(INTERNIMAGE_ISA::load<Vector<uint16_t, N>>(from));
    const U magnitude = bits & 0x7fff;
    // exponent and fraction where a float has them; the exponent is 112 too low, which the product corrects, also for
    // subnormal numbers
    const F finite = (F)(magnitude << 13) * 0x1p112f;
    const U special = 0x7f800000 | (magnitude << 13);
    return (F)((magnitude >= 0x7c00 ? special : (U)finite) | (bits & 0x8000) << 16);
  }
  static INTERNIMAGE_INLINE void store(Fp16* to, F v) {
    const U bits = (U)v, magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    // a normal half: the exponent is 112 lower, the fraction rounded to nearest even
    const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // a subnormal half: adding 0.5 leaves the multiple of 2^-24 in the lowest bits, rounded by the processor
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000;
    U half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? (U{} + 0x7c00) : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000 ? (U{} + 0x7e00) : half;
    INTERNIMAGE_ISA::store(to, narrowed<N>(half | sign));
  }
};

// Copies n elements, the last ones one by one.
template <typename S, typename T>
INTERNIMAGE_INLINE void copy_widened(T* to, const S* from, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= n; i += N) store(to + i, Convert<S, T, N>::load(from + i));
  for (; i < n; ++i) store(to + i, Convert<S, T, 1>::load(from + i));
}

template <typename S, typename T>
INTERNIMAGE_INLINE void copy_narrowed(S* to, const T* from, int64_t n) {
  constexpr int N = kLanes<T>;
  int64_t i = 0;
  for (; i + N <= n; i += N) Convert<S, T, N>::store(to + i, load<Vector<T, N>>(from + i));
  for (; i < n; ++i) Convert<S, T, 1>::store(to + i, load<Vector<T, 1>>(from + i));
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
