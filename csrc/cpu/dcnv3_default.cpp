// SPDX-License-Identifier: MIT
// The kernels for any processor.
#include "dcnv3_cpu.h"

#define INTERNIMAGE_ISA isa_default
#define INTERNIMAGE_BUILD build_default
#define INTERNIMAGE_NAME "default"
#define INTERNIMAGE_VECTOR_BYTES 16
#include "dcnv3_kernels.h"
