// SPDX-License-Identifier: MIT
// The kernels in use.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "kernel_table.h"

namespace internimage {

// Those of a dtype, in the best build that this processor runs. INTERNIMAGE_CPU_CAPABILITY=default|avx2|avx512 lowers
// it.
const Kernels& kernels_of(torch::headeronly::ScalarType dtype);

}  // namespace internimage
