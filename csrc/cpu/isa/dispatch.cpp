// SPDX-License-Identifier: MIT
// The choice of the instruction set at run time.
#include "dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../../boxed.h"
#include "kernel_table.h"

namespace internimage {
namespace {

using torch::headeronly::ScalarType;

#if defined(__x86_64__)
// 2 if the processor has AVX-512 (F, BW, DQ, VL) and the system saves its registers, 1 for AVX2 with FMA, F16C and
// BMI2, else 0. Not by __builtin_cpu_supports, which is false for everything where the linker brings a runtime of its
// own (zig's).
int supported_level() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  constexpr unsigned kFma = 1u << 12, kXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr unsigned kFirst = kFma | kXsave | kAvx | kF16c;
  if ((c & kFirst) != kFirst) return 0;
  unsigned saved, upper;  // bits of the registers that the system saves
  __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6;
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  constexpr unsigned kAvx2 = 1u << 5 | 1u << 8;  // with BMI2
  if ((b & kAvx2) != kAvx2) return 0;
  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  return (b & kAvx512) == kAvx512 && (saved & kZmm) == kZmm ? 2 : 1;
}
#endif

const CpuBuild& choose_build() {
#if defined(__x86_64__)
  int level = supported_level();
  if (const char* requested = std::getenv("INTERNIMAGE_CPU_CAPABILITY")) {
    if (std::strcmp(requested, "default") == 0) level = 0;
    if (std::strcmp(requested, "avx2") == 0 && level > 1) level = 1;
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

// Name of the instruction set in use, for `internimage info`.
std::string cpu_capability() { return current_build().name; }

}  // namespace

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
      STD_TORCH_CHECK(false, "internimage: dtype must be float64, float32, bfloat16 or float16");
      __builtin_unreachable();
  }
}

}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", INTERNIMAGE_BOX(&internimage::cpu_capability));
}
