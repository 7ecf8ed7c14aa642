// SPDX-License-Identifier: MIT
// The position of a unit, and where its numbers stand in offset and mask and in their gradients.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../storage.cuh"
#include "arguments.h"

namespace internimage {
namespace cuda {

template <typename Index>
__device__ __forceinline__ Index quotient(Index dividend, const Divider<Index>& divider) {
  if constexpr (sizeof(Index) > 4) {
    return dividend / divider.divisor;
  } else {
    return (__umulhi(dividend, divider.multiplier) + dividend) >> divider.shift;
  }
}

// The position of a unit.
template <typename T, typename Index>
struct Unit {
  Index pixel, group, image;  // the output pixel's number in the batch
  T x, y;  // the kernel's center

  __device__ __forceinline__ Unit(const Arguments<T, Index>& a, Index unit) {
    pixel = quotient(unit, a.groups);
    group = unit - pixel * a.groups.divisor;
    const Index row = quotient(pixel, a.out_width);
    x = static_cast<T>(static_cast<int32_t>(pixel - row * a.out_width.divisor) * a.stride_w + a.first_x);
    image = quotient(row, a.out_height);
    y = static_cast<T>(static_cast<int32_t>(row - image * a.out_height.divisor) * a.stride_h + a.first_y);
  }
  // Of an output pixel of an image.
  __device__ __forceinline__ Unit(const Arguments<T, Index>& a, Index group_, Index image_, int32_t column, int32_t row)
      : pixel((image_ * a.out_rows + row) * a.out_columns + column),
        group(group_),
        image(image_),
        x(static_cast<T>(column * a.stride_w + a.first_x)),
        y(static_cast<T>(row * a.stride_h + a.first_y)) {}
};

// Where the numbers of a unit's points stand in their tensors.
template <int kLayout>
struct Places {
  uint64_t first_offset, first_mask, first_grad_offset, first_grad_mask;

  template <typename T, typename Index>
  __device__ __forceinline__ Places(const Arguments<T, Index>& a, const Unit<T, Index>& unit, uint64_t, int)
      : first_offset(first(a.offset, unit)),
        first_mask(first(a.mask, unit)),
        first_grad_offset(first(a.grad_offset, unit)),
        first_grad_mask(first(a.grad_mask, unit)) {}
  __device__ __forceinline__ uint64_t offset(uint32_t k) const { return first_offset + 2 * k; }
  __device__ __forceinline__ uint64_t mask(uint32_t k) const { return first_mask + k; }
  __device__ __forceinline__ uint64_t grad_offset(uint32_t k) const { return first_grad_offset + 2 * k; }
  __device__ __forceinline__ uint64_t grad_mask(uint32_t k) const { return first_grad_mask + k; }

 private:
  template <typename T, typename Index>
  static __device__ __forceinline__ uint64_t first(const UnitStrides& stride, const Unit<T, Index>& unit) {
    return static_cast<uint64_t>(unit.pixel) * stride.pixel + static_cast<uint64_t>(unit.group) * stride.group;
  }
};

template <>
struct Places<kDense> {
  uint64_t first_point;

  // Of unit number `index` of the batch, with so many points.
  template <typename T, typename Index>
  __device__ __forceinline__ Places(const Arguments<T, Index>&, const Unit<T, Index>&, uint64_t index, int points)
      : first_point(index * points) {}
  __device__ __forceinline__ uint64_t offset(uint32_t k) const { return 2 * (first_point + k); }
  __device__ __forceinline__ uint64_t mask(uint32_t k) const { return first_point + k; }
  __device__ __forceinline__ uint64_t grad_offset(uint32_t k) const { return offset(k); }
  __device__ __forceinline__ uint64_t grad_mask(uint32_t k) const { return mask(k); }
};

// The offset of a point, (x, y).
template <int kLayout, typename S, typename T, typename Index>
__device__ __forceinline__ void load_shift(const Arguments<T, Index>& a, const S* from, T (&shift)[2]) {
  if constexpr (kLayout == kStridedOdd) {
#pragma unroll
    for (int i = 0; i < 2; ++i) shift[i] = Storage<S>::widen(__ldg(from + i));
  } else {
    load<S, 2>(from, shift);
  }
  if constexpr (kLayout != kDense) {
    const T first = shift[0];
    shift[0] = a.y_first ? shift[1] : first;
    shift[1] = a.y_first ? first : shift[1];
  }
}

// Stores the gradient of a point's offset, (x, y).
template <int kLayout, typename S, typename T, typename Index>
__device__ __forceinline__ void store_shift(const Arguments<T, Index>& a, S* to, const T (&shift)[2]) {
  if constexpr (kLayout == kDense) {
    store<S, 2>(to, shift);
  } else {
    const T ordered[2] = {a.y_first ? shift[1] : shift[0], a.y_first ? shift[0] : shift[1]};
    if constexpr (kLayout == kStridedEven) {
      store<S, 2>(to, ordered);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) to[i] = Storage<S>::narrow(ordered[i]);
    }
  }
}

}  // namespace cuda
}  // namespace internimage
