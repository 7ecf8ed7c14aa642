// SPDX-License-Identifier: MIT
// Variants of the kernels, which serve only if they are asked for: a measurement on a GPU decides which become the
// default. On the host.
#pragma once

#include <cstring>

namespace internimage {
namespace cuda {

// Each serves the problems that it can; the default kernels serve all others.
struct Variants {
  bool tiles;  // forward: tiles of output pixels (tiles.cuh)
  bool window;  // backward: tensor cores (window.cuh)
  bool fixed;  // deterministic backward: fixed-point sums (fixed.cuh)
};

constexpr const char* kVariantsVariable = "INTERNIMAGE_CUDA_VARIANTS";

// Variants from a list of names, such as "tiles,window"; null or empty for none. False if it has another name.
inline bool parse_variants(const char* list, Variants& chosen) {
  chosen = {};
  if (list == nullptr || *list == 0) return true;
  for (;;) {
    list += std::strspn(list, " ");
    const size_t length = std::strcspn(list, " ,");
    const auto is = [&](const char* name) {
      return length == std::strlen(name) && std::strncmp(list, name, length) == 0;
    };
    if (is("tiles"))
      chosen.tiles = true;
    else if (is("window"))
      chosen.window = true;
    else if (is("fixed"))
      chosen.fixed = true;
    else
      return false;
    list += length;
    list += std::strspn(list, " ");
    if (*list == 0) return true;
    if (*list++ != ',') return false;
  }
}

}  // namespace cuda
}  // namespace internimage
