// SPDX-License-Identifier: MIT
// How the work of an image is cut: blocks of groups, strips of output pixels.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/target.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

constexpr int64_t kStripPoints = 576;  // the arrays of a strip fit the L1 cache

// The groups of an image, cut into blocks of at most `limit` groups.
struct Blocks {
  int64_t total;  // groups of an image
  int64_t size;  // groups of a block; the last one may have fewer
  int64_t count;  // blocks

  Blocks(const Problem& p, int64_t limit)
      : total(p.groups), size(limit < total ? limit : total), count((total + size - 1) / size) {}
  int64_t begin(int64_t block) const { return block * size; }
  int64_t groups(int64_t block) const { return block + 1 < count ? size : total - block * size; }
};

// The size of all strips of a block: whole rows of output pixels, or a part of one row. Those at the edges may be
// smaller.
struct StripShape {
  int64_t groups;  // of a block
  int64_t points;  // sampling points of a group
  int64_t rows, columns;  // output pixels of a strip
  int64_t strips_down, strips_across;

  StripShape(const Problem& p, int64_t group_count) : groups(group_count), points(p.points) {
    const int64_t pixels = kStripPoints / (groups * points);
    columns = pixels < 1 ? 1 : pixels < p.out_width ? pixels : p.out_width;
    rows = pixels / p.out_width;
    if (p.stride_h > 2) rows = 1;  // the rows of the image that a strip samples should follow each other
    rows = rows < 1 ? 1 : rows < p.out_height ? rows : p.out_height;
    strips_down = (p.out_height + rows - 1) / rows;
    strips_across = (p.out_width + columns - 1) / columns;
  }
  int64_t size() const { return rows * columns * groups * points; }
  int64_t count() const { return strips_down * strips_across; }
};

// One strip: where it is, and how many output pixels it has.
struct Strip {
  int64_t y, x;  // of its first output pixel
  int64_t pixels;
  int64_t first_pixel;  // its index in the batch; the others follow it

  Strip(const Problem& p, const StripShape& shape, int64_t index, int64_t image) {
    y = index / shape.strips_across * shape.rows;
    x = index % shape.strips_across * shape.columns;
    const int64_t rows = y + shape.rows <= p.out_height ? shape.rows : p.out_height - y;
    const int64_t columns = x + shape.columns <= p.out_width ? shape.columns : p.out_width - x;
    pixels = rows * columns;
    first_pixel = (image * p.out_height + y) * p.out_width + x;
  }
};

// Rows of the image that a strip samples: [begin, end), clipped to the image.
struct RowRange {
  int64_t begin, end;
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
