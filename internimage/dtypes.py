# SPDX-License-Identifier: MIT
"""The names of the floating-point types that models run in and weights are stored in, without torch."""

from .values import Choice

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # accepted everywhere; the long names are printed
NAMES = tuple(SHORT.values())
DTYPE = Choice(NAMES, SHORT)
