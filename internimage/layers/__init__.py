# SPDX-License-Identifier: MIT
"""Layers over the operators."""

from .attention_pool import AttentivePool
from .dcnv3 import DCNv3

__all__ = ["AttentivePool", "DCNv3"]
