// SPDX-License-Identifier: MIT
// What a caller must know of a pass before it runs it.
#pragma once

#include <cstdint>

namespace internimage {

// A pass as a sequence of tasks: disjoint ranges of them may run in parallel, each with its own scratch memory.
struct Plan {
  int64_t tasks, scratch_bytes;
};

}  // namespace internimage
