// SPDX-License-Identifier: MIT
// The kernels of one instruction set: DCNv3, and layer norm (norm.h).
//
// Included once by each dcnv3_<isa>.cpp, which sets the compiler's target and defines INTERNIMAGE_ISA (a namespace),
// INTERNIMAGE_BUILD and INTERNIMAGE_NAME (the table at the end), and INTERNIMAGE_VECTOR_BYTES; no include guards here nor
// in what is included. Nothing of the C++ library may be instantiated here: its code would be compiled for this
// instruction set, and the linker could keep that copy for all.
//
// Work is cut into strips of some 600 sampling points, for which everything fits the first-level cache:
//   1. points.h   offsets and mask of the strip to the compute type, softmax; then, vectorised over points, where each
//                 samples and the weights of its four corners;
//   2. plane.h    the rows of the image that these points sample, copied to where borders need no care;
//   3. forward.h  vectorised over channels: weighted sums of the corners;
//      backward.h vectorised over channels: gradients to the corners, and four dot products a point, from which follow,
//                 vectorised over points, the gradients of offset and mask.
#include "vectors.h"
#include "points.h"
#include "plane.h"
#include "forward.h"
#include "backward.h"
#include "norm.h"

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

template <typename S, typename T>
constexpr Kernels kKernels = {plan_forward<S, T>, forward<S, T>, plan_backward<S, T>, backward<S, T>, layer_norm<S, T>};

}  // namespace INTERNIMAGE_ISA

extern const CpuBuild INTERNIMAGE_BUILD = {
    INTERNIMAGE_NAME,
    INTERNIMAGE_ISA::kKernels<float, float>,
    INTERNIMAGE_ISA::kKernels<double, double>,
    INTERNIMAGE_ISA::kKernels<INTERNIMAGE_ISA::Bf16, float>,
    INTERNIMAGE_ISA::kKernels<INTERNIMAGE_ISA::Fp16, float>,
};

}  // namespace internimage
