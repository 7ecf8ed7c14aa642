// SPDX-License-Identifier: MIT
#include "driver.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "../../library.h"

namespace internimage {
namespace cuda {
namespace {

#ifdef _WIN32
constexpr const char *kDriver = "nvcuda.dll", *kTorch = "torch_cuda.dll";
#else
constexpr const char *kDriver = "libcuda.so.1", *kTorch = "libtorch_cuda.so";
#endif

constexpr int kRelaxedCapture = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

// Names as in cuda.h.
struct Driver {
  DriverResult (*cuGetErrorName)(DriverResult, const char**);
  DriverResult (*cuGetErrorString)(DriverResult, const char**);
  DriverResult (*cuCtxGetCurrent)(void**);
  DriverResult (*cuCtxSetCurrent)(void*);
  DriverResult (*cuDevicePrimaryCtxRetain)(void**, int);
  DriverResult (*cuThreadExchangeStreamCaptureMode)(int*);
  DriverResult (*cuModuleLoadData)(void**, const void*);
  DriverResult (*cuModuleGetFunction)(DriverFunction*, void*, const char*);
  DriverResult (*cuModuleUnload)(void*);
  DriverResult (*cuLaunchKernel)(DriverFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                 void*, void**, void**);

  Driver() {
    void* library = open_library(kDriver);
    STD_TORCH_CHECK(library != nullptr, "internimage::dcnv3: the CUDA driver, '", kDriver, "', cannot be loaded");
    find(library, "cuGetErrorName", cuGetErrorName);
    find(library, "cuGetErrorString", cuGetErrorString);
    find(library, "cuCtxGetCurrent", cuCtxGetCurrent);
    find(library, "cuCtxSetCurrent", cuCtxSetCurrent);
    find(library, "cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain);
    find(library, "cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode);
    find(library, "cuModuleLoadData", cuModuleLoadData);
    find(library, "cuModuleGetFunction", cuModuleGetFunction);
    find(library, "cuModuleUnload", cuModuleUnload);
    find(library, "cuLaunchKernel", cuLaunchKernel);
  }

 private:
  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(symbol_of(library, name));
    STD_TORCH_CHECK(function != nullptr, "internimage::dcnv3: the CUDA driver has no ", name, ": it is too old");
  }
};

const Driver& driver() {
  static const Driver instance;  // tried again by the next call if it throws
  return instance;
}

// A thread that has not called the CUDA runtime yet, such as one of autograd's, has no context; the runtime would take
// the primary one, which torch uses.
DriverResult ensure_context(int32_t device) {
  void* context = nullptr;
  DriverResult error = driver().cuCtxGetCurrent(&context);
  if (error != 0 || context != nullptr) return error;
  error = driver().cuDevicePrimaryCtxRetain(&context, device);  // never released: it lives as long as the process
  return error != 0 ? error : driver().cuCtxSetCurrent(context);
}

}  // namespace

std::string describe(DriverResult error) {
  const char *name = nullptr, *text = nullptr;
  if (driver().cuGetErrorName(error, &name) != 0 || name == nullptr) name = "CUDA error";
  if (driver().cuGetErrorString(error, &text) != 0 || text == nullptr) text = "unknown";
  return std::string(name) + " (" + text + ")";
}

bool is_refusal(DriverResult error) {
  switch (error) {
    case 200:  // CUDA_ERROR_INVALID_IMAGE
    case 209:  // CUDA_ERROR_NO_BINARY_FOR_GPU
    case 218:  // CUDA_ERROR_INVALID_PTX
    case 221:  // CUDA_ERROR_JIT_COMPILER_NOT_FOUND
    case 222:  // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    case 223:  // CUDA_ERROR_JIT_COMPILATION_DISABLED
    case 300:  // CUDA_ERROR_INVALID_SOURCE
    case 500:  // CUDA_ERROR_NOT_FOUND: the kernel is not in the image
      return true;
    default:
      return false;
  }
}

DriverResult load_function(int32_t device, const void* image, const char* kernel, DriverFunction* function) {
  DriverResult error = ensure_context(device);
  if (error != 0) return error;
  int mode = kRelaxedCapture;  // loading allocates memory, which ends a capture in the other modes
  driver().cuThreadExchangeStreamCaptureMode(&mode);
  void* module = nullptr;
  error = driver().cuModuleLoadData(&module, image);
  if (error == 0) {
    error = driver().cuModuleGetFunction(function, module, kernel);
    if (error != 0) driver().cuModuleUnload(module);
  }
  driver().cuThreadExchangeStreamCaptureMode(&mode);
  return error;
}

DriverResult launch_function(int32_t device, DriverFunction function, unsigned blocks, unsigned threads, void* stream,
                             void** arguments) {
  const DriverResult error = ensure_context(device);
  if (error != 0) return error;
  return driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr);
}

void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);  // as in torch/csrc/inductor/aoti_torch/c/shim.h, for CUDA builds
  static const Function function = [] {
    void* library = loaded_library(kTorch);  // this module is not linked against it: a CPU build of torch has none
    void* found = library == nullptr ? nullptr : symbol_of(library, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(found != nullptr, "internimage::dcnv3: torch has no CUDA streams");
    return reinterpret_cast<Function>(found);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "internimage::dcnv3: torch has no current stream on device ", device);
  return stream;
}

}  // namespace cuda
}  // namespace internimage
