# SPDX-License-Identifier: MIT
"""Activations by timm's names, and GELU with a kernel of its own."""

from collections.abc import Callable
from reprlib import repr  # shortens, so that a message stays on one line whatever a file contains
from typing import Any

import timm.layers.activations
import torch
import torch.nn.functional as F
from timm.layers import get_act_layer
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..extension import has_kernel
from .fast_path import is_plain, use_fast_path


def activation_class(act_layer: Any) -> Callable[..., nn.Module]:
    """The class of an activation; ours for GELU.

    Args:
        act_layer: timm's name of it, or the class itself.

    Raises:
        ValueError: It is neither.
    """
    try:
        known = get_act_layer(act_layer)
    except (KeyError, TypeError):
        known = None
    if not callable(known):  # timm returns None for an empty name, and anything that is not a name as it is
        raise ValueError(f"act_layer must be timm's name of an activation, such as 'gelu', got {repr(act_layer)}")
    return GELU if known in (nn.GELU, timm.layers.activations.GELU) else known


class _Gelu(torch.autograd.Function):
    """GELU in training on a CPU. Second derivatives are those of torch's operator."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return torch.ops.internimage.gelu.default(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph: the gradient is differentiated again
            return torch.ops.aten.gelu_backward.default(grads[0], *ctx.saved_tensors)
        return torch.ops.internimage.gelu_backward.default(grads[0], *ctx.saved_tensors)


@register_notrace_module  # a leaf of timm's FX graphs, whose results then match those of the model bit for bit
class GELU(timm.layers.activations.GELU):
    """GELU; CPU inference uses the compiled kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if use_fast_path(input) and has_kernel("gelu_", "cpu"):
                if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
                    # keeps this layout: the operator would copy twice, and a convolution behind it once more
                    return torch.ops.internimage.gelu.default(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                return torch.ops.internimage.gelu.default(input)
            if torch.is_grad_enabled() and is_plain(input) and has_kernel("gelu_backward", "cpu"):
                return _Gelu.apply(input)
        return F.gelu(input)
