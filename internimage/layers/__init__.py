# SPDX-License-Identifier: MIT
"""Layers over the operators."""

from .dcn import DCNv3
from .pool import AttentivePool

__all__ = ["AttentivePool", "DCNv3"]
