// SPDX-License-Identifier: MIT
// From the function of an operator to what torch's dispatcher calls. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdio>
#include <exception>

namespace internimage {

// Calls a boxed function. If it throws, stores what the exception says and returns false.
template <auto kBoxed, int kBytes>
__attribute__((noinline)) bool call_and_catch(StableIValue* stack, uint64_t arguments, uint64_t outputs,
                                              char (&message)[kBytes]) noexcept {
  try {
    kBoxed(stack, arguments, outputs);
    return true;
  } catch (const std::exception& error) {
    std::snprintf(message, kBytes, "%s", error.what());
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
  char message[1024];
  if (!call_and_catch<kBoxed>(stack, arguments, outputs, message))
    aoti_torch_check(false, "internimage", __FILE__, __LINE__, message);
}

}  // namespace internimage

// TORCH_BOX for a function that may throw.
#define INTERNIMAGE_BOX(function) &internimage::boxed<TORCH_BOX(function)>
