// SPDX-License-Identifier: MIT
// What is compiled for: isa/avx2.cpp and isa/avx512.cpp define this before they include any kernel; here is what holds
// for any processor, and what a tool sees that looks at one header.
#pragma once

#if !defined(INTERNIMAGE_ISA)
#define INTERNIMAGE_ISA isa_default  // a namespace
#define INTERNIMAGE_BUILD build_default  // the table of these kernels
#define INTERNIMAGE_NAME "default"
#define INTERNIMAGE_VECTOR_BYTES 16
#endif
