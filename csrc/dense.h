// SPDX-License-Identifier: MIT
// Contiguous tensors without a call of torch's dispatcher where there is nothing to do. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace internimage {

// t, or a contiguous copy: torch::stable::contiguous takes a microsecond also for tensors that are.
inline torch::stable::Tensor dense(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace internimage
