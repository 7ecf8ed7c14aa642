// SPDX-License-Identifier: MIT
// What is used of the CUDA driver, without its header: the declarations are part of its stable binary interface.
#pragma once

#include <cstdint>
#include <string>

namespace internimage {
namespace cuda {

using DriverFunction = void*;  // CUfunction
using DriverResult = int;  // CUresult; 0 is success

constexpr DriverResult kOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY

// Name and description of an error, such as "CUDA_ERROR_OUT_OF_MEMORY (out of memory)".
std::string describe(DriverResult error);

// Whether the driver cannot use an image that was compiled correctly, or that is damaged: it is of another
// architecture, or newer than the driver.
bool is_refusal(DriverResult error);

// Loads a compiled image on a device, for the life of the process, and finds a kernel in it. Raises if there is no
// driver. Safe while a stream is being captured.
DriverResult load_function(int32_t device, const void* image, const char* kernel, DriverFunction* function);

// Launches a kernel on a stream (CUstream), asynchronously. Returns what the driver says.
DriverResult launch_function(int32_t device, DriverFunction function, unsigned blocks, unsigned threads, void* stream,
                             void** arguments);

// torch's current stream of a device.
void* current_stream(int32_t device);

}  // namespace cuda
}  // namespace internimage
