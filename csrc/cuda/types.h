// SPDX-License-Identifier: MIT
// The type that a kernel computes in for each type that it stores, on host and device.
#pragma once

namespace internimage {
namespace cuda {

template <typename S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};

template <typename S>
using Compute = typename ComputeOf<S>::Type;

}  // namespace cuda
}  // namespace internimage
