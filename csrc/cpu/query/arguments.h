// SPDX-License-Identifier: MIT
// The arguments of the query kernels.
#pragma once

#include <cstdint>

namespace internimage {

// output = gelu(layer norm of the depthwise convolution of input), all channels last and contiguous; conv_weight is
// (channels, kernel_h, kernel_w), and conv_bias may be null.
struct QueryArguments {
  const void *input, *conv_weight, *conv_bias, *norm_weight, *norm_bias;
  void* output;
  int64_t height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  double eps;
};

}  // namespace internimage
