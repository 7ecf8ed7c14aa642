# SPDX-License-Identifier: MIT
"""Layers built on the operators."""

from .attention_pool import AttentivePool
from .dcnv3 import DCNv3
from .deform_conv import DeformConv2d, ModulatedDeformConv2d, accept_old_keys
from .packing import set_weight_packing

__all__ = [
    "AttentivePool", "DCNv3", "DeformConv2d", "ModulatedDeformConv2d", "accept_old_keys", "set_weight_packing",
]  # fmt: skip
