# SPDX-License-Identifier: MIT
"""Operators. `dcnv3` is the public function; `torch.ops.internimage.dcnv3` is the operator beneath it, unchecked."""

from .dcnv3 import dcnv3

__all__ = ["dcnv3"]
