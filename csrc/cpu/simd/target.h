// SPDX-License-Identifier: MIT
// The instruction set to compile for. isa/avx2.cpp and isa/avx512.cpp define these before they include any kernel; the
// defaults are for any processor, and for tools that parse a single header.
#pragma once

#if !defined(INTERNIMAGE_ISA)
#define INTERNIMAGE_ISA isa_default  // a namespace
#define INTERNIMAGE_BUILD build_default  // the table of these kernels
#define INTERNIMAGE_NAME "default"
#define INTERNIMAGE_VECTOR_BYTES 16
#endif
