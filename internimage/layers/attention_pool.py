# SPDX-License-Identifier: MIT
"""Attentive pooling: the head of the huge and giant InternImage."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factory import FactoryKwargs
from .norm import create_norm


class _PoolingAttention(nn.Module):
    """Multi-head attention of one query over all positions, with the parameter names of the official `cross_dcn`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        if channels % num_heads != 0:
            raise ValueError(f"num_heads must divide the channels: {channels} channels, {num_heads} heads")
        self.num_heads = num_heads
        # weights and biases are separate parameters, under the official names
        self.q_bias = nn.Parameter(torch.zeros(channels, **dd))
        self.k_bias = nn.Parameter(torch.zeros(channels, **dd))
        self.v_bias = nn.Parameter(torch.zeros(channels, **dd))
        self.q = nn.Linear(channels, channels, bias=False, **dd)
        self.k = nn.Linear(channels, channels, bias=False, **dd)
        self.v = nn.Linear(channels, channels, bias=False, **dd)
        self.proj = nn.Linear(channels, out_channels, **dd)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = F.linear(query, self.q.weight, self.q_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = F.linear(key, self.k.weight, self.k_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = F.linear(value, self.v.weight, self.v_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, 1, channels / heads)
        return self.proj(x.transpose(1, 2).flatten(-2))


class AttentivePool(nn.Module):
    """Pools a feature map by attention, with the mean of the map as the query.

    Args:
        channels: Number of channels of the map.
        out_channels: Number of output channels.
        num_heads: Number of attention heads; divides `channels`.
        device, dtype: Of the parameters.

    Shapes:
        (N, channels, H, W) -> (N, out_channels).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        self.norm1_q = create_norm(channels, **dd)
        self.norm1_k = create_norm(channels, **dd)
        self.norm1_v = create_norm(channels, **dd)
        self.cross_dcn = _PoolingAttention(channels, out_channels, num_heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (N, H * W, channels)
        query = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(x), self.norm1_v(x)).squeeze(1)
