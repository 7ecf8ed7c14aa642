// SPDX-License-Identifier: MIT
// The sizes and options of a gather, for the kernels of every device.
#pragma once

#include <cstdint>

namespace internimage {

// Where the numbers of units stand in a tensor: elements from one output pixel to the next, and from one group to the
// next. The numbers of one unit are adjacent.
struct UnitStrides {
  int64_t pixel, group;
};

struct Problem {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, group_channels;
  int64_t points;  // sampling points per group
  double offset_scale;
  bool remove_center, softmax;
  bool row_major;  // the kernel's points are ordered row by row, else column by column
  bool y_first;  // of the two numbers of an offset, else x is
  UnitStrides offset, mask, grad_offset, grad_mask;
};

}  // namespace internimage
