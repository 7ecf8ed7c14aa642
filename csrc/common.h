// SPDX-License-Identifier: MIT
// The sizes and options of a gather, for the kernels of every device.
#pragma once

#include <cstdint>

namespace internimage {

struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, group_channels;
  int64_t points;  // sampling points per group
  double offset_scale;
  bool remove_center, softmax;
  int64_t offset_stride, mask_stride;  // elements from one output pixel to the next, on a CPU
};

}  // namespace internimage
