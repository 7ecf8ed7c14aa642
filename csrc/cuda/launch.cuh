// SPDX-License-Identifier: MIT
// From torch to the kernels: aligned tensors, dtypes, torch's stream. LibTorch stable ABI only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <limits>

#include "gather/arguments.cuh"
#include "gather/forward.cuh"

namespace internimage {
namespace cuda {

// Runs kernels on torch's current stream of a device, asynchronously.
struct Launch {
  cudaStream_t stream;

  explicit Launch(int32_t device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  template <typename Kernel, typename... A>
  void operator()(Kernel* kernel, int64_t threads, A... arguments) const {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "internimage::dcnv3: a problem of ", threads,
                    " threads is too large for one launch; split the batch");
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion,
                    "internimage::dcnv3: the CUDA kernels were not compiled for this GPU (", cudaGetErrorString(error),
                    "); `internimage info` tells for which, TORCH_CUDA_ARCH_LIST chooses when the package is built");
    STD_CUDA_CHECK(error);
  }
};

// The tensor, contiguous and aligned to what a thread loads from a pixel; a copy if it is not. New memory is aligned.
inline torch::stable::Tensor aligned(const torch::stable::Tensor& tensor) {
  const torch::stable::Tensor t = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kForwardBytes == 0 ? t : torch::stable::clone(t);
}

// Calls run with a value of the dtype's storage type.
template <typename Run>
void with_dtype(torch::headeronly::ScalarType dtype, const Run& run) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Half)
    run(__half());
  else if (dtype == ScalarType::BFloat16)
    run(__nv_bfloat16());
  else if (dtype == ScalarType::Float)
    run(float());
  else if (dtype == ScalarType::Double)
    run(double());
  else
    STD_TORCH_CHECK(false, "internimage::dcnv3: dtype must be float64, float32, bfloat16 or float16");
}

}  // namespace cuda
}  // namespace internimage
