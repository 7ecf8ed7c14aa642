// SPDX-License-Identifier: MIT
// The choice of the instruction set at run time.
#include "dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "kernel_table.h"

namespace internimage {
namespace {

using torch::headeronly::ScalarType;

const CpuBuild& choose_build() {
#if defined(__x86_64__)
  int level = 0;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
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
  m.impl("cpu_capability", TORCH_BOX(&internimage::cpu_capability));
}
