// SPDX-License-Identifier: MIT
// From the function of an operator to what torch's dispatcher calls. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>

#include "library.h"

namespace internimage {

// What to say of an exception. torch's functions return a code; its headers turn that into an exception that names the
// call alone, and since torch 2.13 the thread's last error can be asked for: CUDA is out of memory, for example.
inline const char* said_by(const std::exception& error) {
  if (std::strstr(error.what(), "API call failed at") == nullptr) return error.what();
  using Function = const char* (*)();
  static const auto last_error =
      reinterpret_cast<Function>(symbol_of_torch("torch_exception_get_what_without_backtrace"));
  const char* said = last_error == nullptr ? nullptr : last_error();
  return said == nullptr || *said == 0 ? error.what() : said;
}

// Calls a boxed function. If it throws, stores what the exception says and returns false.
template <auto kBoxed, int kBytes>
__attribute__((noinline)) bool call_and_catch(StableIValue* stack, uint64_t arguments, uint64_t outputs,
                                              char (&message)[kBytes]) noexcept {
  try {
    kBoxed(stack, arguments, outputs);
    return true;
  } catch (const std::exception& error) {
    std::snprintf(message, kBytes, "%s", said_by(error));
  } catch (...) {
    std::snprintf(message, kBytes, "internimage: unknown exception");
  }
  return false;
}

// No exception of ours may reach torch, whose C++ runtime can be another one (libstdc++ there, libc++ here): unwinding
// through the frames of both crashes. torch throws the error itself, through this function, which has no destructors
// and no handlers, so that its frame needs no C++ runtime.
template <auto kBoxed>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  char message[4096];
  if (!call_and_catch<kBoxed>(stack, arguments, outputs, message))
    aoti_torch_check(false, "internimage", __FILE__, __LINE__, message);
}

}  // namespace internimage

// TORCH_BOX for a function that may throw.
#define INTERNIMAGE_BOX(function) &internimage::boxed<TORCH_BOX(function)>
