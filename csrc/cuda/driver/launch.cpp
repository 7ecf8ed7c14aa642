// SPDX-License-Identifier: MIT
#include "launch.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "driver.h"

namespace internimage {
namespace cuda {
namespace {

using torch::stable::Tensor;

// What `internimage::cuda_kernel` gives: an image, empty if there is none, and the kernel's name in it.
std::pair<Tensor, std::string> compile(int32_t device, const std::string& kernel, int64_t argument_bytes,
                                       const std::string& refusal) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(kernel), from(argument_bytes), from(static_cast<int64_t>(device)), from(refusal)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("internimage::cuda_kernel", "", stack, TORCH_ABI_VERSION));
  const Tensor image = to<Tensor>(stack[0]), name = to<Tensor>(stack[1]);
  const char* begin = static_cast<const char*>(name.const_data_ptr());
  return {image, name.numel() > 0 ? std::string(begin, begin + name.numel()) : std::string()};
}

// Raises what a failure of the driver means.
void check(DriverResult error, const std::string& kernel) {
  STD_TORCH_CHECK(error != kOutOfMemory, "internimage::dcnv3: CUDA out of memory: the driver has none left for ",
                  kernel, "; use a smaller batch");
  STD_TORCH_CHECK(error == 0, "internimage::dcnv3: launching ", kernel, " failed: ", describe(error),
                  ". It may be the error of an earlier kernel: CUDA_LAUNCH_BLOCKING=1 shows which");
}

// Compiles a kernel or takes it from the cache, and loads it.
DriverFunction prepare(int32_t device, const std::string& kernel, int64_t argument_bytes) {
  std::string refusal;
  for (;;) {
    const auto [image, name] = compile(device, kernel, argument_bytes, refusal);
    STD_TORCH_CHECK(image.numel() > 0 || name.empty(), "internimage: ", name);  // an error of the user
    if (image.numel() == 0) throw NoKernel();
    DriverFunction function = nullptr;
    const DriverResult error = load_function(device, image.const_data_ptr(), name.c_str(), &function);
    if (error == 0) return function;
    if (!is_refusal(error)) check(error, kernel);
    refusal = describe(error);  // the compiler knows whether another attempt makes sense
  }
}

}  // namespace

DriverLaunch::DriverLaunch(int32_t device_) : device(device_), stream(current_stream(device_)) {
  STD_TORCH_CHECK(device < kMostDevices, "internimage::dcnv3: there are too many devices");
}

void DriverLaunch::run(Functions& functions, std::string (*kernel)(), int64_t argument_bytes, int64_t threads,
                       int width, void** arguments) const {
  const int64_t blocks = (threads + width - 1) / width;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "internimage::dcnv3: a problem of ", threads,
                  " threads is too large for one launch; split the batch");
  DriverFunction function = functions[device].load(std::memory_order_acquire);
  if (function == nullptr) {
    function = prepare(device, kernel(), argument_bytes);  // two threads may do so at a time
    functions[device].store(function, std::memory_order_release);
  }
  const DriverResult error =
      launch_function(device, function, static_cast<unsigned>(blocks), static_cast<unsigned>(width), stream, arguments);
  if (error != 0) check(error, kernel());
}

}  // namespace cuda
}  // namespace internimage
