// SPDX-License-Identifier: MIT
// What is kept of a strip's sampling points.
#pragma once

#include <cstdint>

#include "../simd/target.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Scratch for one strip: arrays over its points, in order of pixel, group and point, with room for whole vectors
// behind.
template <typename T>
struct Points {
  T* offset;  // 2 a point: x, y
  T* logits;
  T* factor;  // mask, or softmax(logits)
  T *kernel_x, *kernel_y, *centre_x, *centre_y;  // the regular grid of the strip at the image's upper left corner
  T* weight[4];  // bilinear share times factor: upper left, upper right, lower left, lower right
  int32_t* pixel;  // upper left corner, counted in the padded plane
  // backward only
  T *right, *below;  // shares of the right and of the lower pixels
  T* dots;  // 4 a point: <grad, corner>
  T* own;  // the factor where the point is inside the image, else 0

  // Numbers in an array: room for whole vectors behind, and for the units that `softmax` fills a block of four with.
  static int64_t padded(const StripShape& shape) { return (shape.size() + 4 * shape.points + 143) / 16 * 16; }

  static int64_t bytes(const StripShape& shape) {
    return padded(shape) * (int64_t)(20 * sizeof(T) + sizeof(int32_t)) + 64;
  }

  Points(void* scratch, const StripShape& shape) {
    const int64_t n = padded(shape);
    T* next = (T*)(((uintptr_t)scratch + 63) / 64 * 64);
    const auto take = [&next](int64_t count) {
      T* here = next;
      next += count;
      return here;
    };
    offset = take(2 * n);
    dots = take(4 * n);
    T** arrays[] = {&logits,    &factor,    &kernel_x,  &kernel_y, &centre_x, &centre_y, &weight[0],
                    &weight[1], &weight[2], &weight[3], &right,    &below,    &own};
    for (T** array : arrays) *array = take(n);
    pixel = (int32_t*)next;
  }
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
