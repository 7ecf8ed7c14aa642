// SPDX-License-Identifier: MIT
// Forward by tiles, a variant: what a thread does is forward.cuh's, but the threads of a block process a tile of output
// pixels, whose sampling points are close to each other in both directions, and a cache line of channels at a time.
#pragma once

#include <cstdint>

#include "../types.h"
#include "arguments.h"
#include "forward.cuh"
#include "units.cuh"

namespace internimage {
namespace cuda {

// For image, for tile, for chunk of kTileSlices slices (fewer in the last one), for pixel of the tile, for slice of the
// chunk. The threads of pixels beyond the edge of the image return.
template <typename S, int kChannels, int kPoints, bool kSoftmax, typename Index>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<kPoints>)
    tiles_kernel(const Arguments<Compute<S>, Index> a, const S* __restrict__ input, const S* __restrict__ offset,
                 const S* __restrict__ mask, S* __restrict__ output) {
  const Index thread = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= a.threads) return;
  const Index tile = quotient(thread, a.tile_threads);
  const Index in_tile = thread - tile * a.tile_threads.divisor;
  const Index chunk = quotient(in_tile, a.chunk_threads);
  const Index in_chunk = in_tile - chunk * a.chunk_threads.divisor;
  const bool is_full = chunk < a.full_chunks;
  const Index pixel = is_full ? in_chunk / kTileSlices : quotient(in_chunk, a.last_slices);
  const Index part = in_chunk - pixel * (is_full ? kTileSlices : a.last_slices.divisor);
  const Index y = quotient(pixel, a.tile_width);
  const Index row_of_tiles = quotient(tile, a.tiles_across);
  const Index image = quotient(row_of_tiles, a.tiles_down);
  const int32_t column = static_cast<int32_t>((tile - row_of_tiles * a.tiles_across.divisor) * a.tile_width.divisor +
                                              (pixel - y * a.tile_width.divisor));
  const int32_t row = static_cast<int32_t>((row_of_tiles - image * a.tiles_down.divisor) * a.tile_height + y);
  if (column >= a.out_columns || row >= a.out_rows) return;
  const Index of_pixel = chunk * kTileSlices + part;
  const Index group = quotient(of_pixel, a.slices);
  const Index slice = of_pixel - group * a.slices.divisor;
  const Unit<Compute<S>, Index> unit(a, group, image, column, row);
  const Index index = ((image * a.out_rows + row) * a.out_columns + column) * a.groups.divisor + group;
  forward_slice<S, kChannels, kPoints, kSoftmax>(a, unit, index, slice, index * a.slices.divisor + slice, input, offset,
                                                 mask, output);
}

}  // namespace cuda
}  // namespace internimage
