# SPDX-License-Identifier: MIT
"""Linear layer with less memory traffic in CPU inference. Parameters and results are torch's.

On a CPU this layer is limited by memory bandwidth as much as by arithmetic, and torch's version first writes the bias
to the whole output.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .fast_path import use_fast_path

# The operator behind torch.compile's fused linear layers. It is not public, so its schema is checked.
_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def _min_rows() -> dict[torch.dtype, int]:
    """Minimum number of rows for which the fused operator is faster, for each dtype that supports it."""
    try:
        if str(torch.ops.mkldnn._linear_pointwise.default._schema) != _SCHEMA:
            return {}
        return {torch.float32: 2048} | ({torch.bfloat16: 1} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {})
    except (AttributeError, RuntimeError):
        return {}


_MIN_ROWS = _min_rows()


@register_notrace_module  # a leaf of timm's FX graphs, whose results then match those of the model bit for bit
class Linear(nn.Linear):
    """torch's linear layer; CPU inference fuses the bias where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        if torch.compiler.is_compiling() or type(input) is not Tensor:  # do not branch on their sizes
            return F.linear(input, self.weight, self.bias)
        min_rows = _MIN_ROWS.get(input.dtype)
        if (
            min_rows is not None
            and input.numel() >= min_rows * self.in_features
            and self.bias is not None
            and use_fast_path(input, self.weight, self.bias)
        ):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return F.linear(input, self.weight, self.bias)
