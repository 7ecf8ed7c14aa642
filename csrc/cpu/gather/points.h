// SPDX-License-Identifier: MIT
// The arrays over the sampling points of a strip.
#pragma once

#include <cstdint>

#include "../simd/target.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Scratch arrays over the points of one strip, ordered by output pixel, group and kernel point, and padded to whole
// vectors.
template <typename T>
struct Points {
  T* offset;  // 2 per point: x, y
  T* logits;  // the mask, if there is a softmax
  T* factor;  // the mask, or softmax(logits)
  T *kernel_x, *kernel_y, *center_x, *center_y;  // the regular grid of a strip at the image's upper left corner
  T* weight[4];  // bilinear share times factor: upper left, upper right, lower left, lower right
  int32_t* pixel;  // upper left corner, as an index into the padded plane
  // backward only
  T *right, *below;  // bilinear shares of the right and the lower pixels
  T* dots;  // 4 per point: <grad_output, corner>
  T* inside_factor;  // the factor if the point is inside the image, else 0

  // The gradients reuse arrays that are no longer needed, so that a strip stays in the cache: grad_offset is computed
  // after the weights, grad_logits after grad_offset.
  T* grad_offset() const { return offset; }  // 2 per point: x, y
  T* grad_factor() const { return logits; }
  T* grad_logits() const { return below; }
  T* softmax_scratch() const { return right; }

  // Elements per array, with room for whole vectors and for the units that `softmax` adds to make the last four.
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
    T** arrays[] = {&logits,    &factor,    &kernel_x,  &kernel_y, &center_x, &center_y,     &weight[0],
                    &weight[1], &weight[2], &weight[3], &right,    &below,    &inside_factor};
    for (T** array : arrays) *array = take(n);
    pixel = (int32_t*)next;
  }
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
