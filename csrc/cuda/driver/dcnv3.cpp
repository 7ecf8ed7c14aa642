// SPDX-License-Identifier: MIT
// DCNv3 with kernels that are compiled when they are first needed, by internimage/nvrtc. LibTorch stable ABI only.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "../../boxed.h"
#include "../dcnv3/dcnv3.h"
#include "launch.h"

namespace internimage {
namespace cuda {
namespace {

using torch::headeronly::HeaderOnlyArrayRef;

// Calls the operator in plain torch.
template <typename... Results, typename... A>
auto call_reference(const char* name, const A&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  if constexpr (sizeof...(Results) == 1) {
    return to<Tensor>(stack[0]);
  } else {
    return std::tuple<Results...>{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }
}

Tensor dcnv3_or_reference(const Tensor& input, const Tensor& offset, const Tensor& mask,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, double offset_scale, bool remove_center,
                          bool softmax) {
  try {
    return dcnv3<DriverLaunch>(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale,
                               remove_center, softmax);
  } catch (const NoKernel&) {
    return call_reference<Tensor>("internimage::dcnv3_reference", input, offset, mask, kernel_size, stride, padding,
                                  dilation, groups, offset_scale, remove_center, softmax);
  }
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward_or_reference(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& mask,
    std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, double offset_scale, bool remove_center, bool softmax,
    bool deterministic, std::vector<bool> output_mask) {
  try {
    return dcnv3_backward<DriverLaunch>(grad_output, input, offset, mask, kernel_size, stride, padding, dilation,
                                        groups, offset_scale, remove_center, softmax, deterministic, output_mask);
  } catch (const NoKernel&) {
    const bool wanted[] = {output_mask[0], output_mask[1], output_mask[2]};
    return call_reference<Tensor, Tensor, Tensor>(
        "internimage::dcnv3_backward_reference", grad_output, input, offset, mask, kernel_size, stride, padding,
        dilation, groups, offset_scale, remove_center, softmax, deterministic, HeaderOnlyArrayRef<bool>(wanted, 3));
  }
}

// Not when the module is loaded: it also serves where CUDA has other kernels, or none can be compiled.
void serve_cuda() {
  static const bool registered = [] {
    TorchLibraryHandle library = nullptr;  // never deleted, so that it stays registered
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("internimage", "CUDA", __FILE__, __LINE__, &library));
    const auto add = [&](const char* name, void (*function)(StableIValue*, uint64_t, uint64_t)) {
      TORCH_ERROR_CODE_CHECK(torch_library_impl(library, name, function, TORCH_ABI_VERSION));
    };
    add("dcnv3", INTERNIMAGE_BOX(&dcnv3_or_reference));
    add("dcnv3_backward", INTERNIMAGE_BOX(&dcnv3_backward_or_reference));
    return true;
  }();
  (void)registered;
}

}  // namespace
}  // namespace cuda
}  // namespace internimage

STABLE_TORCH_LIBRARY_IMPL(internimage, CompositeExplicitAutograd, m) {
  m.impl("serve_cuda", INTERNIMAGE_BOX(&internimage::cuda::serve_cuda));
}
