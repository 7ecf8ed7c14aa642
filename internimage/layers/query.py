# SPDX-License-Identifier: MIT
"""The features from which DCNv3 predicts offset and mask."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..extension import has_kernel
from .activation import GELU
from .fast_path import has_hooks, use_fast_path
from .norm import LayerNorm


@register_notrace_module  # a leaf of timm's FX graphs, whose results then match those of the model bit for bit
class Query(nn.Sequential):
    """A depthwise convolution, a norm from `create_norm`, and an activation: (N, C, H, W) -> (N, Ho, Wo, C).

    CPU inference with layer norm and GELU takes one pass over memory.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._can_fuse(input):
                return self._forward_fused(input)
        for module in self:
            input = module(input)
        return input

    @torch.jit.unused
    def _can_fuse(self, x: Tensor) -> bool:
        conv, norm, act = self
        if not isinstance(norm, nn.Sequential) or type(act) is not GELU:
            return False
        layer = norm[-1]
        return (
            isinstance(conv, nn.Conv2d)
            and isinstance(layer, LayerNorm)
            and x.numel() > 0
            and use_fast_path(x, conv.weight, conv.bias, layer.weight, layer.bias)
            and has_kernel("query", "cpu")
            and not has_hooks(*self, *norm)
        )

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        conv, norm, _ = self
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.Sequential)
        layer = norm[-1]
        assert isinstance(layer, LayerNorm)
        channels_last = x.permute(0, 2, 3, 1)
        return torch.ops.internimage.query.default(  # type: ignore[no-any-return]
            channels_last,
            conv.weight,
            conv.bias,
            layer.weight,
            layer.bias,
            conv.stride,
            conv.padding,
            layer.eps,
        )
