// SPDX-License-Identifier: MIT
// How the work of an image is divided: blocks of groups, strips of output pixels.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/target.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

constexpr int64_t kStripPoints = 576;  // so that the arrays of a strip fit the L1 cache

// The groups of an image, divided into blocks of at most `limit` groups.
struct Blocks {
  int64_t total;  // groups per image
  int64_t size;  // groups per block; the last one may have fewer
  int64_t count;  // blocks per image

  Blocks(const Problem& p, int64_t limit)
      : total(p.groups), size(limit < total ? limit : total), count((total + size - 1) / size) {}
  int64_t begin(int64_t block) const { return block * size; }
  int64_t groups(int64_t block) const { return block + 1 < count ? size : total - block * size; }
};

// The size of the strips of a block: whole rows of output pixels, or a part of one row. Strips at the edges may be
// smaller.
struct StripShape {
  int64_t groups;  // per block
  int64_t points;  // sampling points per group
  int64_t rows, columns;  // output pixels per strip
  int64_t strips_down, strips_across;

  StripShape(const Problem& p, int64_t group_count) : groups(group_count), points(p.points) {
    const int64_t pixels = kStripPoints / (groups * points);
    columns = pixels < 1 ? 1 : pixels < p.out_width ? pixels : p.out_width;
    rows = pixels / p.out_width;
    if (p.stride_h > 2) rows = 1;  // so that the image rows that a strip samples are adjacent
    rows = rows < 1 ? 1 : rows < p.out_height ? rows : p.out_height;
    strips_down = (p.out_height + rows - 1) / rows;
    strips_across = (p.out_width + columns - 1) / columns;
  }
  int64_t size() const { return rows * columns * groups * points; }
  int64_t count() const { return strips_down * strips_across; }
};

// The position and the size of one strip.
struct Strip {
  int64_t y, x;  // of its first output pixel
  int64_t pixels;
  int64_t first_pixel;  // its index in the batch; the strip's other pixels follow it

  Strip(const Problem& p, const StripShape& shape, int64_t index, int64_t image) {
    y = index / shape.strips_across * shape.rows;
    x = index % shape.strips_across * shape.columns;
    const int64_t rows = y + shape.rows <= p.out_height ? shape.rows : p.out_height - y;
    const int64_t columns = x + shape.columns <= p.out_width ? shape.columns : p.out_width - x;
    pixels = rows * columns;
    first_pixel = (image * p.out_height + y) * p.out_width + x;
  }
};

// The image rows that a strip samples: [begin, end), clipped to the image.
struct RowRange {
  int64_t begin, end;
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
