// SPDX-License-Identifier: MIT
// The gather kernels on the CPU, for one instruction set.
//
//   sample[point] = factor[point] * bilinear(input, location[point])
//   location[point] = center[unit] + (kernel[point] + offset[point]) * offset_scale
//   output[unit] = the sum of the samples of its points; or, with kColumns, these samples
//
// Loop nest:
//
//   for image, for block of groups:                                  backward: one task
//     for strip of output pixels:                                    forward: one task    strips.h
//       offsets and mask to the compute type, softmax                SIMD over points     load.h, softmax.h
//       locations, weights of the corners                            SIMD over points     locate.h
//       rows of the image that are sampled: copied to the plane      SIMD over channels   plane.h
//       for output pixel of the strip, for group of the block:       one unit
//         for point of the unit, for corner:
//           forward: sums += weight * corner                         SIMD over channels   forward.h
//           backward: grad_corner += weight * grad_output,           SIMD over channels   backward.h
//                     dots[corner] = <grad_output, corner>
//       backward: dots -> gradients of offset and mask               SIMD over points     backward.h, softmax.h
//     backward: gradients of the corners -> grad_input               SIMD over channels   plane.h
//
// Glossary:
//   unit    one output pixel of one group: it has P sampling points and group_channels channels
//   factor  what a point is multiplied by: its mask, or the softmax of the masks of its unit
//   corner  one of the four pixels around a point; share: its bilinear weight; weight: share * factor
//   block   groups that are processed together: as many as keep the rows in use in the L2 cache
//   strip   output pixels that are processed together: about 600 points, whose arrays fit the L1 cache
//   plane   a group's channels of one image, dense and padded with zeros, so that no corner is a special case
//   lane    one element of a SIMD vector
//   task    the unit of parallel work; plan: how many tasks a pass has, and their scratch memory
//   S, T    storage type, in tensors; compute type, in registers: float, or double for double
//
// Where offsets and mask stand, and their order, is the caller's choice: `Problem`.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "../simd/target.h"
#include "backward.h"
#include "forward.h"
#include "plan.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

// Without and with kColumns the plans are the same.
template <typename S, typename T>
Plan plan_forward(const Problem& p) {
  const Forward<S, T> forward(p);
  return {forward.tasks(), forward.scratch_bytes()};
}

template <typename S, typename T, bool kColumns>
void forward(const Problem& p, const void* input, const void* offset, const void* mask, void* output, void* scratch,
             int64_t begin, int64_t end) {
  Forward<S, T, kColumns>(p).run((const S*)input, (const S*)offset, (const S*)mask, (S*)output, scratch, begin, end);
}

template <typename S, typename T>
Plan plan_backward(const Problem& p, int64_t wanted_tasks) {
  const Backward<S, T> backward(p, wanted_tasks);
  return {backward.tasks(), backward.scratch_bytes()};
}

template <typename S, typename T, bool kColumns>
void backward(const Problem& p, int64_t wanted_tasks, const void* grad_output, const void* input, const void* offset,
              const void* mask, void* grad_input, void* grad_offset, void* grad_mask, void* scratch, int64_t begin,
              int64_t end) {
  Backward<S, T, kColumns>(p, wanted_tasks)
      .run((const S*)grad_output, (const S*)input, (const S*)offset, (const S*)mask, (S*)grad_input, (S*)grad_offset,
           (S*)grad_mask, scratch, begin, end);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
