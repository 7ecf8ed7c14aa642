// SPDX-License-Identifier: MIT
// Launches of kernels that are compiled when they are first needed, on torch's stream. LibTorch stable ABI only.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "../gather/select.h"
#include "driver.h"
#include "names.h"

namespace internimage {
namespace cuda {

constexpr int32_t kMostDevices = 128;

// There is no kernel for this device; whoever compiles them has said why.
struct NoKernel {};

using Functions = std::atomic<DriverFunction>[kMostDevices];

// Runs kernels on torch's current stream of a device, asynchronously. Throws NoKernel.
struct DriverLaunch {
  static constexpr bool kHasVariants = true;
  static constexpr bool kHasLayouts = false;
  using Half = HalfBits;
  using BFloat16 = BFloat16Bits;
  int32_t device;
  void* stream;

  explicit DriverLaunch(int32_t device_);
  template <typename Kernel, typename First, typename... A>
  void operator()(Kernel, int64_t threads, First first, A... others) const {
    static Functions functions;  // of this kernel
    void* arguments[] = {&first, &others...};
    run(functions, [] { return name_of(Kernel()); }, sizeof(First), threads, kBlockThreads<Kernel>, arguments);
  }

 private:
  void run(Functions& functions, std::string (*kernel)(), int64_t argument_bytes, int64_t threads, int width,
           void** arguments) const;
};

}  // namespace cuda
}  // namespace internimage
