// SPDX-License-Identifier: MIT
// The kernels of the instruction set in use.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "kernel_table.h"

namespace internimage {

// The kernels for a dtype, of the best instruction set that this processor supports;
// INTERNIMAGE_CPU_CAPABILITY=default|avx2|avx512 lowers it.
const Kernels& kernels_of(torch::headeronly::ScalarType dtype);

}  // namespace internimage
