// SPDX-License-Identifier: MIT
// Scratch memory of a thread.
#pragma once

#include <cstdint>
#include <memory>

namespace internimage {

// Uninitialized memory for the calling thread. Up to 4 MiB is kept for its next call, as the page faults of fresh
// memory can take longer than the call itself.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kKeptBytes = 4 << 20;
    thread_local std::unique_ptr<char[]> kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kKeptBytes) {
      large_.reset(new char[bytes]);
    } else if (bytes > kept_bytes) {
      kept_bytes = 0;  // in case the allocation throws
      kept.reset(new char[bytes]);
      kept_bytes = bytes;
    }
    data_ = large_ ? large_.get() : kept.get();
  }
  void* get() const { return data_; }

 private:
  std::unique_ptr<char[]> large_;
  char* data_;
};

}  // namespace internimage
