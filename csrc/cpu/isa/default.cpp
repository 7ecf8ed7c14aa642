// SPDX-License-Identifier: MIT
// The kernels for any processor.
#include "build.h"
