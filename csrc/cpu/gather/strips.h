// SPDX-License-Identifier: MIT
// How the work of an image is cut: blocks of groups, strips of output pixels.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/target.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

constexpr int64_t kStripPoints = 576;  // all that is kept of a strip fits the first-level cache

// The groups of an image, cut into blocks that are taken together.
struct Blocks {
  int64_t all, size, count;

  Blocks(const Problem& p, int64_t most)
      : all(p.groups), size(most < all ? most : all), count((all + size - 1) / size) {}
  int64_t begin(int64_t block) const { return block * size; }
  int64_t groups(int64_t block) const { return block + 1 < count ? size : all - block * size; }
};

// Which output pixels a strip covers: whole rows, or a part of one row.
struct StripShape {
  int64_t groups;  // most groups of a strip
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

// Where one strip lies.
struct StripPlace {
  int64_t y, x;  // of its first output pixel
  int64_t pixels;
  int64_t first;  // index of the first pixel in the batch; the others follow it

  StripPlace(const Problem& p, const StripShape& shape, int64_t strip, int64_t image) {
    y = strip / shape.strips_across * shape.rows;
    x = strip % shape.strips_across * shape.columns;
    const int64_t rows = y + shape.rows <= p.out_height ? shape.rows : p.out_height - y;
    const int64_t columns = x + shape.columns <= p.out_width ? shape.columns : p.out_width - x;
    pixels = rows * columns;
    first = (image * p.out_height + y) * p.out_width + x;
  }
};

// Rows of the image that a strip samples: [begin, end), clipped to the image.
struct RowRange {
  int64_t begin, end;
};

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
