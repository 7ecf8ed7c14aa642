# SPDX-License-Identifier: MIT
"""Layers built on the operators."""

from .attention_pool import AttentivePool
from .dcnv3 import DCNv3
from .packing import set_weight_packing

__all__ = ["AttentivePool", "DCNv3", "set_weight_packing"]
