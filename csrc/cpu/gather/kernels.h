// SPDX-License-Identifier: MIT
// The gather kernels of one instruction set.
//
// Work is cut into strips of some 600 sampling points, for which everything fits the first-level cache:
//   1. points.h   offsets and mask of the strip to the compute type, softmax; then, vectorised over points, where each
//                 samples and the weights of its four corners;
//   2. plane.h    the rows of the image that these points sample, copied to where borders need no care;
//   3. forward.h  vectorised over channels: weighted sums of the corners;
//      backward.h vectorised over channels: gradients to the corners, and four dot products a point, from which follow,
//                 vectorised over points, the gradients of offset and mask.
#pragma once

#include <cstdint>

#include "../../common.h"
#include "backward.h"
#include "forward.h"
#include "plan.h"

namespace internimage {
namespace INTERNIMAGE_ISA {

template <typename S, typename T>
Plan plan_forward(const Problem& p) {
  const Forward<S, T> forward(p);
  return {forward.tasks(), forward.scratch_bytes()};
}

template <typename S, typename T>
void forward(const Problem& p, const void* input, const void* offset, const void* mask, void* output, void* scratch,
             int64_t begin, int64_t end) {
  Forward<S, T>(p).run((const S*)input, (const S*)offset, (const S*)mask, (S*)output, scratch, begin, end);
}

template <typename S, typename T>
Plan plan_backward(const Problem& p, int64_t wanted_tasks) {
  const Backward<S, T> backward(p, wanted_tasks);
  return {backward.tasks(), backward.scratch_bytes()};
}

template <typename S, typename T>
void backward(const Problem& p, int64_t wanted_tasks, const void* grad_output, const void* input, const void* offset,
              const void* mask, void* grad_input, void* grad_offset, void* grad_mask, void* scratch, int64_t begin,
              int64_t end) {
  Backward<S, T>(p, wanted_tasks)
      .run((const S*)grad_output, (const S*)input, (const S*)offset, (const S*)mask, (S*)grad_input, (S*)grad_offset,
           (S*)grad_mask, scratch, begin, end);
}

}  // namespace INTERNIMAGE_ISA
}  // namespace internimage
