# SPDX-License-Identifier: MIT
"""MLP whose hidden layer stays in the cache in CPU inference. Parameters and results are torch's."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .fast_path import use_fast_path
from .linear import Linear

_HIDDEN_BYTES = 2 << 20  # hidden layer of a chunk, per thread: what fits in an L2 cache
_HALF_ROWS = 8192  # minimum rows of a chunk in a 16-bit type, whose weights are repacked on every call


@register_notrace_module
class Mlp(nn.Module):
    """fc2(act(fc1(x))) over the last axis, with the parameter names of timm's Mlp and of the official one.

    CPU inference processes a large input in chunks of rows, whose hidden layer stays in the cache; as a whole it would
    take tens of megabytes, which are written, activated and read again. Rows are independent: the result is the same.

    Args:
        channels: Number of channels of input and output.
        hidden_channels: Number of channels between the two linear layers.
        act_layer: Class of the activation.
        device, dtype: Of the parameters.

    Shapes:
        (..., channels) -> (..., channels).
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        act_layer: type[nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden_channels, device=device, dtype=dtype)
        self.act = act_layer()
        self.fc2 = Linear(hidden_channels, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(self.act(self.fc1(x)))
        if not use_fast_path(x, self.fc1.weight, self.fc2.weight):
            return self.fc2(self.act(self.fc1(x)))
        rows = x.numel() // x.shape[-1]
        chunk = max(1, _HIDDEN_BYTES // (self.fc1.out_features * x.element_size()))
        if x.element_size() < 4:
            chunk = max(chunk, _HALF_ROWS)
        chunk *= torch.get_num_threads()
        if rows <= chunk:
            return self.fc2(self.act(self.fc1(x)))
        flat = x.reshape(rows, x.shape[-1])
        output = flat.new_empty(rows, self.fc2.out_features)
        for begin in range(0, rows, chunk):
            output[begin : begin + chunk] = self.fc2(self.act(self.fc1(flat[begin : begin + chunk])))
        return output.view(x.shape[:-1] + output.shape[-1:])
