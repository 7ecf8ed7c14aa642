# SPDX-License-Identifier: MIT
"""Operators. `dcnv3` is the public function; `torch.ops.internimage.dcnv3` is the operator beneath it, unchecked."""

from .. import extension
from . import layer_norm  # noqa: F401  (its schema)
from .dcnv3 import dcnv3

extension.load()  # after the schemas that it implements

__all__ = ["dcnv3"]
