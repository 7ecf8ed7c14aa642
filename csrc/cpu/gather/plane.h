// SPDX-License-Identifier: MIT
// The channels of a block of groups of one image, copied densely and padded with zeros.
//
// Why a copy: padding makes the border no special case, so a point is one index and four loads at fixed distances; a
// group's pixels are adjacent in memory, where a distance of C elements would map them to few sets of the L1 cache; and
// half types are widened once per pixel instead of 36 times. A 3x3 kernel reads each pixel about 36 times, so the copy
// is cheap. Rows are copied when a strip first needs them.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/storage.h"
#include "../simd/target.h"
#include "../simd/vector.h"
#include "strips.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Two pixels of padding before the image and one after it, as points outside sample the corner at (-2, -2). The padding
// to the right of a row is also that to the left of the next row.
template <typename T>
struct Plane {
  int64_t height, width, channels;  // of the image; channels of one group
  int64_t pitch;  // pixels from one row to the next
  int64_t size;  // elements from one group to the next
  T* data;

  static int64_t elements(const Problem& p) { return ((p.height + 3) * (p.width + 2) + 1) * p.group_channels; }
  // Bytes of the planes of `groups` groups, with room for a whole vector at the end.
  static int64_t bytes(const Problem& p, int64_t groups) {
    return (groups * elements(p) + 16) * (int64_t)sizeof(T) + 64;
  }

  Plane(const Problem& p, void* memory)
      : height(p.height),
        width(p.width),
        channels(p.group_channels),
        pitch(p.width + 2),
        size(elements(p)),
        data((T*)(((uintptr_t)memory + 63) / 64 * 64)) {}

  // The first pixel of row y, which is -2 to height.
  INTERNIMAGE_INLINE T* row(int64_t group, int64_t y) const {
    return data + group * size + ((y + 2) * pitch + 2) * channels;
  }

  // Zeros `pixels` pixels of row y, from `column` on.
  INTERNIMAGE_INLINE void clear(int64_t group, int64_t y, int64_t column, int64_t pixels) const {
    __builtin_memset(row(group, y) + column * channels, 0, pixels * channels * sizeof(T));
  }
};

// The groups per block: so few that the rows of `planes` planes around an output row stay in the L2 cache, and no
// fewer, as offsets and mask are then contiguous.
template <typename T>
inline int64_t groups_in_cache(const Problem& p, int64_t planes) {
  constexpr int64_t kCacheBytes = 256 * 1024;
  const int64_t reach = p.kernel_h * p.dilation_h + 4;
  const int64_t rows = reach < p.height ? reach : p.height;
  const int64_t group_bytes = planes * rows * (p.width + 2) * p.group_channels * (int64_t)sizeof(T);
  const int64_t count = kCacheBytes / group_bytes;
  return count < 1 ? 1 : count;
}

// The rows of an input image, copied on demand.
template <typename S, typename T>
struct InputPlane : Plane<T> {
  const S* image = nullptr;  // first channel of the first group
  int64_t all_channels, groups = 0;
  int64_t begin = 0, end = 0;  // rows copied so far

  InputPlane(const Problem& p, void* memory) : Plane<T>(p, memory), all_channels(p.channels) {}

  void reset(const S* first, int64_t group_count) {
    image = first;
    groups = group_count;
    begin = end = 0;
    for (int64_t g = 0; g < groups; ++g) {
      this->clear(g, -2, -2, 2 * this->pitch + 2);  // the two rows above, and the left padding of row 0
      this->clear(g, this->height, -2, this->pitch + 1);
    }
  }

  void ensure(RowRange rows) {
    // after a jump (a large stride) the rows in between are not needed
    if (begin == end || rows.begin > end || rows.end < begin) begin = end = rows.begin;
    while (begin > rows.begin) copy_row(--begin);
    while (end < rows.end) copy_row(end++);
  }

 private:
  INTERNIMAGE_NOINLINE void copy_row(int64_t y) {
    const S* from = image + y * this->width * all_channels;
    for (int64_t g = 0; g < groups; ++g, from += this->channels) {
      T* to = this->row(g, y);
      this->clear(g, y, -2, 2);
      this->clear(g, y, this->width, 2);
      if (this->channels == 16) {
        constexpr int N = kLanes<T> < 16 ? kLanes<T> : 16;
        for (int64_t x = 0; x < this->width; ++x)
          for (int c = 0; c < 16; c += N) store(to + x * 16 + c, Convert<S, T, N>::load(from + x * all_channels + c));
      } else {
        for (int64_t x = 0; x < this->width; ++x)
          copy_widened(to + x * this->channels, from + x * all_channels, this->channels);
      }
    }
  }
};

// Accumulates the gradient of the input. What is added outside the image ends up in the padding and is dropped.
template <typename S, typename T>
struct GradientPlane : Plane<T> {
  GradientPlane(const Problem& p, void* memory) : Plane<T>(p, memory) {}

  void reset(int64_t groups) { __builtin_memset(this->data, 0, groups * this->size * sizeof(T)); }

  // Writes the sums of the first `groups` groups to `image`, the first channel of the first group.
  INTERNIMAGE_NOINLINE void write(S* image, int64_t all_channels, int64_t groups) const {
    for (int64_t y = 0; y < this->height; ++y)
      for (int64_t x = 0; x < this->width; ++x)
        for (int64_t g = 0; g < groups; ++g)
          copy_narrowed(image + (y * this->width + x) * all_channels + g * this->channels,
                        this->row(g, y) + x * this->channels, this->channels);
  }
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
