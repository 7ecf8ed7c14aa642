# SPDX-License-Identifier: MIT
"""The features from which DCNv3 predicts offset and mask."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..extension import has_kernel
from .activation import GELU
from .fast_path import has_hooks, use_fast_path
from .norm import LayerNorm, ToChannelsLast, layer_norm_of


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
        parts = self.parts()
        if parts is None:
            return False
        conv, norm = parts
        sequence = self[1]
        assert isinstance(sequence, nn.Sequential)
        return (
            use_fast_path(x, conv.weight, conv.bias, norm.weight, norm.bias)
            and x.numel() > 0
            and has_kernel("query", "cpu")
            and not has_hooks(*self, *sequence)
        )

    def parts(self) -> tuple[nn.Conv2d, LayerNorm] | None:
        """Convolution and layer norm; None if the modules are not those that the operator computes."""
        modules = list(self._modules.values())
        if len(modules) != 3 or type(modules[0]) is not nn.Conv2d or type(modules[2]) is not GELU:
            return None
        conv, norm = modules[0], layer_norm_of(modules[1], ToChannelsLast)
        depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.dilation == (1, 1)
        if norm is None or not depthwise or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return conv, norm

    @torch.jit.unused
    def _forward_fused(self, x: Tensor) -> Tensor:
        parts = self.parts()
        assert parts is not None
        conv, norm = parts
        channels_last = x.permute(0, 2, 3, 1)
        return torch.ops.internimage.query.default(
            channels_last, conv.weight, conv.bias, norm.weight, norm.bias, conv.stride, conv.padding, norm.eps
        )
