// SPDX-License-Identifier: MIT
// What a caller needs to know to run a pass.
#pragma once

#include <cstdint>

namespace internimage {

// A pass as a sequence of tasks: disjoint ranges of them may run in parallel, each with its own scratch memory.
struct Plan {
  int64_t tasks, scratch_bytes;
};

}  // namespace internimage
