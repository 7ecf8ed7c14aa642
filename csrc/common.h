// SPDX-License-Identifier: MIT
// What the gather kernels of every device are given besides pointers.
#pragma once

#include <cstdint>

namespace internimage {

struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, group_channels;
  int64_t points;  // sampling points of a group
  double offset_scale;
  bool remove_center, softmax;
};

}  // namespace internimage
