// SPDX-License-Identifier: MIT
// What a caller must know of a pass before it runs it.
#pragma once

#include <cstdint>

namespace internimage {

// A pass as a row of tasks: any ranges of them may be run at once, each with scratch memory of its own.
struct Plan {
  int64_t tasks, scratch_bytes;
};

}  // namespace internimage
