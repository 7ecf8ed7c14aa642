# SPDX-License-Identifier: MIT
"""Linear layer and MLP, with shorter ways through memory for inference on a CPU. Parameters and results are torch's.

On a CPU these layers are bound by memory as much as by arithmetic: torch's linear layer first writes the bias to the
whole output, and an MLP's hidden layer fills tens of megabytes that are written, activated and read again.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .plainly import runs_plainly

# The operator behind torch.compile's fused linear layers. It is not public, so its schema is compared.
_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def _least_rows() -> dict[torch.dtype, int]:
    """From how many rows on the fused operator is the faster one, for the dtypes in which it can be used."""
    try:
        if str(torch.ops.mkldnn._linear_pointwise.default._schema) != _SCHEMA:
            return {}
        return {torch.float32: 2048} | ({torch.bfloat16: 1} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {})
    except (AttributeError, RuntimeError):
        return {}


_LEAST_ROWS = _least_rows()

_HIDDEN_BYTES = 2 << 20  # of a piece's hidden layer for each thread: what a second-level cache holds
_HALF_ROWS = 8192  # least rows of a piece in a half type, whose weights are packed anew with every call


@register_notrace_module  # timm's FX graphs call it as a whole, and get the bits that the model has without them
class Linear(nn.Linear):
    """torch's linear layer; in inference on a CPU the bias is added on the way, where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        if torch.compiler.is_compiling() or type(input) is not Tensor:  # the sizes of either must not be asked for
            return F.linear(input, self.weight, self.bias)
        least_rows = _LEAST_ROWS.get(input.dtype)
        if (
            least_rows is not None
            and input.numel() >= least_rows * self.in_features
            and self.bias is not None
            and runs_plainly(input, self.weight, self.bias)
        ):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return F.linear(input, self.weight, self.bias)


@register_notrace_module
class Mlp(nn.Module):
    """fc2(act(fc1(x))) over the last axis; keys of timm's Mlp and of the official one.

    In inference on a CPU a large input goes through in pieces, whose hidden layer stays in the cache. Every row is its
    own, so the pieces change nothing else.

    Args:
        channels: Channels of input and output.
        hidden_channels: Channels between the two linear layers.
        act_layer: Class of the activation.
        device, dtype: Of the parameters.

    Shapes:
        (..., channels) -> (..., channels).
    """

    def __init__(
        self, channels: int, hidden_channels: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = Linear(hidden_channels, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(self.act(self.fc1(x)))
        if not runs_plainly(x, self.fc1.weight, self.fc2.weight):
            return self.fc2(self.act(self.fc1(x)))
        rows = x.numel() // x.shape[-1]
        piece = max(1, _HIDDEN_BYTES // (self.fc1.out_features * x.element_size()))
        if x.element_size() < 4:
            piece = max(piece, _HALF_ROWS)
        piece *= torch.get_num_threads()
        if rows <= piece:
            return self.fc2(self.act(self.fc1(x)))
        flat = x.reshape(rows, x.shape[-1])
        output = flat.new_empty(rows, self.fc2.out_features)
        for begin in range(0, rows, piece):
            output[begin : begin + piece] = self.fc2(self.act(self.fc1(flat[begin : begin + piece])))
        return output.view(x.shape[:-1] + output.shape[-1:])
