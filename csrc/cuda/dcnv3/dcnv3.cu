// SPDX-License-Identifier: MIT
// Registration of DCNv3 with the kernels that nvcc compiles. LibTorch stable ABI only.
#include "../launch.cuh"  // first: only nvcc can check that it needs nothing before it

#include <torch/csrc/stable/library.h>

#include "dcnv3.h"

STABLE_TORCH_LIBRARY_IMPL(internimage, CUDA, m) {
  m.impl("dcnv3", TORCH_BOX(&internimage::cuda::dcnv3<internimage::cuda::CompiledLaunch>));
  m.impl("dcnv3_backward", TORCH_BOX(&internimage::cuda::dcnv3_backward<internimage::cuda::CompiledLaunch>));
}
