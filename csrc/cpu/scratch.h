// SPDX-License-Identifier: MIT
// Scratch memory of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

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

// Calls run(scratch, begin, end) for parts of [0, tasks) in torch's threads, at least `grain` tasks at a time. torch
// must not see an exception (boxed.h), so that one in a thread is thrown afterwards.
template <typename Run>
void parallel_with_scratch(int64_t tasks, int64_t grain, int64_t scratch_bytes, const Run& run) {
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    try {
      const Scratch scratch(scratch_bytes);
      run(scratch.get(), begin, end);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "internimage: out of memory for ", scratch_bytes, " bytes of scratch");
}

}  // namespace internimage
