# SPDX-License-Identifier: MIT
"""Linear layers whose CPU inference uses `ops.onednn.product`. Parameters and results are torch's."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops.onednn import product
from .fast_path import use_fast_path


@register_notrace_module  # a leaf of timm's FX graphs, whose results then match those of the model bit for bit
class Linear(nn.Linear):
    """torch's linear layer; CPU inference uses `product`."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if use_fast_path(input, self.weight, self.bias):
                return product(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)
