// SPDX-License-Identifier: MIT
// The arguments of the layer norm kernels.
#pragma once

#include <cstdint>

namespace internimage {

// output = residual + scale * (layer norm of input), in rows of `channels` elements; residual and scale may be null.
struct LayerNormArguments {
  const void *input, *weight, *bias, *residual, *scale;
  const void* addend;  // null, or what is added to the input first, whose memory then has the sum
  void* output;
  int64_t channels;
  double eps;
};

}  // namespace internimage
