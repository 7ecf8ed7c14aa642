// SPDX-License-Identifier: MIT
// What the stable ABI's tensors lack: contiguous ones without a call of torch's dispatcher, and a comparison of shapes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace internimage {

// t, or a contiguous copy: torch::stable::contiguous takes a microsecond also for tensors that are.
inline torch::stable::Tensor dense(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline bool same_sizes(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

}  // namespace internimage
