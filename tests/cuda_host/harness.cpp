// SPDX-License-Identifier: MIT
// The CUDA kernels on a CPU, as a shared library for ctypes. Passes return "" or an error message.
#include "cuda_host.h"
// last, as it needs the names above
#include "../../csrc/cuda/gather/kernels.cuh"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace {

std::string message, kernels;
bool runs_kernels = true;

// The name of a template instantiation, as in "forward_kernel<__half, 16, 9, true, unsigned int>".
std::string name_of(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info) || info.dli_sname == nullptr) return "?";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  name = name.substr(0, name.find('('));
  return name.substr(name.find("cuda::") + 6);
}

struct Launch {
  template <typename Kernel, typename... A>
  void operator()(Kernel name, int64_t threads, A... arguments) const {
    if (!message.empty()) return;
    const auto kernel = internimage::cuda::function_of(name);
    kernels += name_of(reinterpret_cast<const void*>(kernel)) + ";";
    if (runs_kernels) message = cuda_host::launch(kernel, threads, internimage::cuda::kThreads, arguments...);
  }
};

template <typename Run>
const char* with_dtype(const char* dtype, const Run& run) {
  const std::string name = dtype;
  message.clear();
  kernels.clear();
  if (name == "float32")
    run(float());
  else if (name == "float64")
    run(double());
  else if (name == "float16")
    run(__half());
  else if (name == "bfloat16")
    run(__nv_bfloat16());
  else
    message = "no such dtype";
  return message.c_str();
}

}  // namespace

extern "C" {

// The kernels of the last call, each followed by a semicolon.
const char* launched() { return kernels.c_str(); }

// Whether calls run their kernels, or only record their names.
void set_runs_kernels(bool value) { runs_kernels = value; }

const char* forward(const char* dtype, const internimage::Problem* p, const void* input, const void* offset,
                    const void* mask, void* output, bool wide) {
  return with_dtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    internimage::cuda::forward(*p, (const S*)input, (const S*)offset, (const S*)mask, (S*)output, wide, Launch());
  });
}

const char* backward(const char* dtype, const internimage::Problem* p, const void* grad_output, const void* input,
                     const void* offset, const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                     bool deterministic, bool wide) {
  return with_dtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    internimage::cuda::backward(*p, (const S*)grad_output, (const S*)input, (const S*)offset, (const S*)mask,
                                (internimage::cuda::Compute<S>*)grad_input, (S*)grad_offset, (S*)grad_mask,
                                deterministic, wide, Launch());
  });
}

// quotients[i] = dividends[i] / divisor
void divide(uint32_t divisor, const uint32_t* dividends, uint32_t* quotients, int64_t n) {
  const internimage::cuda::Divider<uint32_t> divider(divisor);
  for (int64_t i = 0; i < n; ++i) quotients[i] = internimage::cuda::quotient(dividends[i], divider);
}

// Converts a value to the storage type and back.
float round_trip(const char* dtype, float value) {
  float result = 0;
  with_dtype(dtype, [&](auto zero) {
    using Storage = internimage::cuda::Storage<decltype(zero)>;
    result = static_cast<float>(Storage::widen(Storage::narrow(value)));
  });
  return result;
}
}
