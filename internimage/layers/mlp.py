# SPDX-License-Identifier: MIT
"""MLP whose hidden layer stays in the cache in CPU inference. Parameters and results are torch's."""

from collections.abc import Callable

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .activation import GELU
from .fast_path import has_hooks, use_fast_path
from .linear import Linear

_HIDDEN_BYTES = 2 << 20  # hidden layer of a chunk, per thread: what fits in an L2 cache
_HALF_ROWS = 8192  # minimum rows of a chunk in a 16-bit type whose weights are brought in order for each chunk


def chunk_rows(rows: int, hidden_channels: int, dtype: torch.dtype, packed: bool = False) -> int:
    """How many rows go through an MLP together, so that their hidden layer stays in the cache, in chunks of one size.

    Args:
        rows: All rows.
        hidden_channels: Channels of the hidden layer.
        dtype: Of the rows.
        packed: Whether the weights are packed.
    """
    largest = max(1, _HIDDEN_BYTES // (hidden_channels * dtype.itemsize))
    if dtype.itemsize < 4 and not packed:
        largest = max(largest, _HALF_ROWS)
    chunks = -(-rows // (largest * torch.get_num_threads()))
    return -(-rows // max(1, chunks))


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
        act_layer: Callable[..., nn.Module] = GELU,
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
        if not use_fast_path(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias):
            return self.fc2(self.act(self.fc1(x)))
        rows = x.reshape(-1, x.shape[-1])
        size = chunk_rows(len(rows), self.fc1.out_features, x.dtype)
        if len(rows) <= size or has_hooks(self.fc1, self.act, self.fc2):
            return self.fc2(self.act(self.fc1(x)))
        output = rows.new_empty(len(rows), self.fc2.out_features)
        for begin in range(0, len(rows), size):
            output[begin : begin + size] = self.fc2(self.act(self.fc1(rows[begin : begin + size])))
        return output.view(x.shape[:-1] + output.shape[-1:])
