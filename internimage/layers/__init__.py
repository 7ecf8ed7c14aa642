# SPDX-License-Identifier: MIT
"""Layers built on the operators."""

from .attention_pool import AttentivePool
from .dcnv3 import DCNv3

__all__ = ["AttentivePool", "DCNv3"]
