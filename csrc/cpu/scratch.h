// SPDX-License-Identifier: MIT
// Memory for what a task keeps while it runs.
#pragma once

#include <cstdint>
#include <memory>

namespace internimage {

// Memory of the calling thread that is not set to anything. A moderate amount is kept for the thread's next call: fresh
// memory costs a page fault for every few kilobytes, which together take longer than some whole calls do.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kMostKept = 4 << 20;
    thread_local std::unique_ptr<char[]> kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kMostKept) {
      own_.reset(new char[bytes]);
    } else if (bytes > kept_bytes) {
      kept_bytes = 0;  // should the allocation fail
      kept.reset(new char[bytes]);
      kept_bytes = bytes;
    }
    data_ = own_ ? own_.get() : kept.get();
  }
  void* get() const { return data_; }

 private:
  std::unique_ptr<char[]> own_;
  char* data_;
};

}  // namespace internimage
