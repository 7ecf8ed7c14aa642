// SPDX-License-Identifier: MIT
// A fingerprint of tensors, to notice changes that torch does not count. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "../boxed.h"

namespace internimage {
namespace {

using torch::stable::Tensor;

// Of four elements of each tensor, spread evenly: each may be on a cache line that has to be fetched.
int64_t fingerprint(std::vector<Tensor> tensors) {
  uint64_t hash = 0;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_contiguous(), "internimage::fingerprint: tensors must be contiguous");
    const int64_t count = tensor.numel(), bytes = tensor.element_size();
    const int64_t step = count / 4 | 1;  // odd, so that elements of different columns are read
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count && bytes <= 8; i += step) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + i * bytes, bytes);
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CPU, m) { m.impl("fingerprint", INTERNIMAGE_BOX(&internimage::fingerprint)); }
