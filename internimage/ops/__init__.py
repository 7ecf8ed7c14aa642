# SPDX-License-Identifier: MIT
"""Operators. `dcnv3` checks its arguments; the operator under it, `torch.ops.internimage.dcnv3`, does not."""

from .. import extension
from ..nvrtc import RUN_TIME_KERNELS
from . import deform_columns, gelu, layer_norm, query  # noqa: F401  (they define schemas)
from .dcnv3 import dcnv3

extension.load(RUN_TIME_KERNELS)  # the kernels implement the schemas defined above

__all__ = ["dcnv3"]
