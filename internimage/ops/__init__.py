# SPDX-License-Identifier: MIT
"""Operators. These functions check their arguments; the operators under them, such as `torch.ops.internimage.dcnv3`,
do not."""

from .. import extension
from ..nvrtc import RUN_TIME_KERNELS
from . import gelu, layer_norm, query  # noqa: F401  (they define schemas)
from .dcnv3 import dcnv3
from .deform_conv import deform_conv2d

extension.load(RUN_TIME_KERNELS)  # the kernels implement the schemas defined above

__all__ = ["dcnv3", "deform_conv2d"]
