// SPDX-License-Identifier: MIT
// Every CUDA kernel of the dense layout and nothing else, for tests that inspect the compiled code.
#include "../../csrc/cuda/gather/kernels.cuh"
#include "../../csrc/cuda/gather/variants.h"

namespace internimage {
namespace cuda {

struct Launch {
  static constexpr bool kHasVariants = true;
  static constexpr bool kHasLayouts = false;
  template <typename Kernel, typename... A>
  void operator()(Kernel kernel, int64_t threads, A... arguments) const {
    constexpr int kWidth = kBlockThreads<Kernel>;
    function_of(kernel)<<<static_cast<unsigned>((threads + kWidth - 1) / kWidth), kWidth>>>(arguments...);
  }
};

#define INTERNIMAGE_INSTANTIATE(S)                                                                                     \
  template void forward<S, Launch>(const Problem&, const S*, const S*, const S*, S*, bool, const Variants&,            \
                                   const Launch&);                                                                     \
  template void backward<S, Launch>(const Problem&, const S*, const S*, const S*, const S*, Compute<S>*, S*, S*, bool, \
                                    uint64_t*, bool, const Variants&, const Launch&);

INTERNIMAGE_INSTANTIATE(__half)
INTERNIMAGE_INSTANTIATE(__nv_bfloat16)
INTERNIMAGE_INSTANTIATE(float)
INTERNIMAGE_INSTANTIATE(double)

}  // namespace cuda
}  // namespace internimage
