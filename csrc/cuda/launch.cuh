// SPDX-License-Identifier: MIT
// Launches of the kernels that nvcc compiles, on torch's stream. LibTorch stable ABI only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <limits>

#include "gather/kernels.cuh"
#include "gather/select.h"

namespace internimage {
namespace cuda {

// Runs kernels on torch's current stream of a device, asynchronously.
struct CompiledLaunch {
  static constexpr bool kHasVariants = false;  // their kernels would make the module larger by more than half
  static constexpr bool kHasLayouts = false;
  using Half = __half;
  using BFloat16 = __nv_bfloat16;
  cudaStream_t stream;

  explicit CompiledLaunch(int32_t device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  template <typename Kernel, typename... A>
  void operator()(Kernel kernel, int64_t threads, A... arguments) const {
    constexpr int kWidth = kBlockThreads<Kernel>;
    const int64_t blocks = (threads + kWidth - 1) / kWidth;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "internimage::dcnv3: a problem of ", threads,
                    " threads is too large for one launch; split the batch");
    function_of(kernel)<<<static_cast<unsigned>(blocks), kWidth, 0, stream>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion,
                    "internimage::dcnv3: the CUDA kernels were not compiled for this GPU (", cudaGetErrorString(error),
                    "); `internimage info` tells for which, TORCH_CUDA_ARCH_LIST chooses when the package is built");
    STD_CUDA_CHECK(error);
  }
};

}  // namespace cuda
}  // namespace internimage
