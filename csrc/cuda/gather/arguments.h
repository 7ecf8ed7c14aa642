// SPDX-License-Identifier: MIT
// The parameters of a launch, the same for every thread; made on the host, with or without a CUDA compiler.
#pragma once

#include <cstdint>

#include "../../common.h"

namespace internimage {
namespace cuda {

constexpr int kThreads = 256;  // per block
constexpr int kForwardBytes = 32;  // that a thread of the forward loads from a pixel
constexpr int kBackwardChannels = 4;  // that a thread of the backward processes at a time
constexpr int kLaneChannels = 8;  // of a thread of the backward of a 3x3 kernel
constexpr int kTileSide = 8;  // of a tile of the forward, at most
constexpr int kTileSlices = 4;  // adjacent slices of a pixel in a tile of the forward: a cache line of 128 bytes
// of the window kernel: a warp for a tile of output pixels and a group
constexpr int kWindowThreads = 32, kWindowTileWidth = 8, kWindowTileHeight = 4, kWindowChannels = 16;
// of the fixed-point sums: channels that a thread processes if there are enough, threads that read for the range, words
// of memory before the sums, log2 of the largest scaled product, and the fewest bits below it
constexpr int kFixedChannels = 4, kFixedReaders = 1 << 17, kFixedHeader = 1, kFixedProduct = 4, kFixedLeast = 28;

// Where the numbers of units stand in offset and mask and in their gradients, as far as a kernel is compiled for it.
// Dense is DCNv3's: unit after unit, points column by column, x before y. With another layout, Arguments has the
// strides and the order. Odd: some unit may begin at an odd element, so that the two numbers of an offset are not
// aligned to their size and are loaded and stored one by one; with 9 points, so it is with every other group of a
// tensor that has a group's offsets and then its masks.
constexpr int kDense = 0, kStridedEven = 1, kStridedOdd = 2;

// Division by a divisor that is known at launch: a multiplication and a shift, for dividends below 2^31 (`quotient` in
// units.cuh).
template <typename Index>
struct Divider {
  Index divisor;
  uint32_t multiplier, shift;

  Divider() = default;
  explicit Divider(int64_t number) : divisor(static_cast<Index>(number)), multiplier(0), shift(0) {
    if constexpr (sizeof(Index) == 4) {
      while ((int64_t{1} << shift) < number) ++shift;
      multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - number)) / number + 1);
    }
  }
};

// A tile of output pixels, for the kernels that process them by tiles; tiles cover each image separately.
struct Tile {
  int64_t width, height;
};

// T: the compute type. Index: uint32_t if there are fewer than 2^31 threads and elements per image, else uint64_t; the
// starts of images, offsets and masks in their tensors are always 64-bit.
template <typename T, typename Index>
struct Arguments {
  Index threads;
  Divider<Index> slices;  // forward: threads per unit
  uint32_t lane_bits, lanes, chunks;  // backward: log2 of the threads per unit, that number, and the chunks of each
  Divider<Index> groups, out_width, out_height;
  Index channels, width, row_elements;
  uint64_t image_elements;
  uint32_t group_channels;
  int32_t points, kernel_h, kernel_w, dilation_h, dilation_w, center_h, center_w;
  int32_t stride_h, stride_w, first_y, first_x;  // center of the kernel at output pixel (0, 0)
  int32_t out_rows, out_columns;
  T right_end, lower_end, last_column, last_row;
  T grid_x[3], grid_y[3];  // of a 3x3 kernel
  T offset_scale;
  bool remove_center, softmax;
  bool row_major, y_first;  // of a layout that is not dense
  // of the variants, last, so that the code of the default kernels does not change
  Index height;
  // tiles: how many there are of an image, and their size
  Divider<Index> tiles_across, tiles_down, tile_width;
  uint32_t tile_height;
  // of the threads of a tile of the forward: in a tile, for kTileSlices slices of its pixels, and for what is left of
  // the slices after `full_chunks` times as many
  Divider<Index> tile_threads, chunk_threads, last_slices;
  uint32_t full_chunks;
  UnitStrides offset, mask, grad_offset, grad_mask;  // of a layout that is not dense

  Arguments(const Problem& p, int64_t slices_, int64_t lanes_, int64_t chunks_, int64_t threads_, Tile tile = {1, 1})
      : threads(static_cast<Index>(threads_)),
        slices(slices_),
        lane_bits(0),
        lanes(static_cast<uint32_t>(lanes_)),
        chunks(static_cast<uint32_t>(chunks_)),
        groups(p.groups),
        out_width(p.out_width),
        out_height(p.out_height),
        channels(static_cast<Index>(p.channels)),
        width(static_cast<Index>(p.width)),
        row_elements(static_cast<Index>(p.width * p.channels)),
        image_elements(static_cast<uint64_t>(p.height * p.width * p.channels)),
        group_channels(static_cast<uint32_t>(p.group_channels)),
        points(static_cast<int32_t>(p.points)),
        kernel_h(static_cast<int32_t>(p.kernel_h)),
        kernel_w(static_cast<int32_t>(p.kernel_w)),
        dilation_h(static_cast<int32_t>(p.dilation_h)),
        dilation_w(static_cast<int32_t>(p.dilation_w)),
        center_h(static_cast<int32_t>(p.dilation_h * (p.kernel_h - 1) / 2)),
        center_w(static_cast<int32_t>(p.dilation_w * (p.kernel_w - 1) / 2)),
        stride_h(static_cast<int32_t>(p.stride_h)),
        stride_w(static_cast<int32_t>(p.stride_w)),
        first_y(static_cast<int32_t>(center_h - p.pad_h)),
        first_x(static_cast<int32_t>(center_w - p.pad_w)),
        out_rows(static_cast<int32_t>(p.out_height)),
        out_columns(static_cast<int32_t>(p.out_width)),
        right_end(static_cast<T>(p.width)),
        lower_end(static_cast<T>(p.height)),
        last_column(static_cast<T>(p.width - 1)),
        last_row(static_cast<T>(p.height - 1)),
        offset_scale(static_cast<T>(p.offset_scale)),
        remove_center(p.remove_center),
        softmax(p.softmax),
        row_major(p.row_major),
        y_first(p.y_first),
        height(static_cast<Index>(p.height)),
        tiles_across((p.out_width + tile.width - 1) / tile.width),
        tiles_down((p.out_height + tile.height - 1) / tile.height),
        tile_width(tile.width),
        tile_height(static_cast<uint32_t>(tile.height)),
        tile_threads(tile.width * tile.height * p.groups * slices_),
        chunk_threads(tile.width * tile.height * kTileSlices),
        last_slices(p.groups * slices_ % kTileSlices + (p.groups * slices_ % kTileSlices == 0 ? kTileSlices : 0)),
        full_chunks(static_cast<uint32_t>(p.groups * slices_ / kTileSlices)),
        offset(p.offset),
        mask(p.mask),
        grad_offset(p.grad_offset),
        grad_mask(p.grad_mask) {
    while ((uint32_t{1} << lane_bits) < lanes) ++lane_bits;
    for (int i = 0; i < 3; ++i) {
      grid_x[i] = static_cast<T>(i * p.dilation_w - center_w);
      grid_y[i] = static_cast<T>(i * p.dilation_h - center_h);
    }
  }
};

}  // namespace cuda
}  // namespace internimage
