// SPDX-License-Identifier: MIT
// The schemas of the operators that exported programs call, as a library of its own, for processes without Python: they
// load it, and then the kernels. In Python internimage.ops registers them, and torch refuses to do so twice.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(internimage, m) {
  m.def(
      "dcnv3(Tensor input, Tensor offset, Tensor mask, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, float offset_scale, bool remove_center, bool softmax) -> Tensor");
  m.def(
      "deform_columns(Tensor input, Tensor offset, Tensor mask, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int offset_groups) -> Tensor");
}
