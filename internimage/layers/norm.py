# SPDX-License-Identifier: MIT
"""Layer norm, layout changes as modules, and norms that change the layout.

The official checkpoints name a norm by its index in a short sequence of layout changes (`norm1.1.weight`), so the
sequences determine the state-dict keys.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..extension import has_kernel
from .fast_path import use_fast_path


class ToChannelsFirst(nn.Module):
    """(N, H, W, C) -> (N, C, H, W), a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@register_notrace_module  # a leaf of timm's FX graphs, whose results then match those of the model bit for bit
class LayerNorm(nn.LayerNorm):
    """torch's layer norm over the last axis; CPU inference uses the compiled kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if use_fast_path(input, self.weight, self.bias) and has_kernel("layer_norm", "cpu"):
            return torch.ops.internimage.layer_norm(input, self.weight, self.bias, self.eps)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def layer_norm_of(norm: nn.Module, *before: type[nn.Module]) -> LayerNorm | None:
    """The layer norm of a sequence from `create_norm`; None if it is anything else.

    Args:
        norm: The sequence.
        before: The classes of what precedes the norm in it.
    """
    if type(norm) is not nn.Sequential:
        return None
    *others, last = norm._modules.values() or [None]
    if type(last) is not LayerNorm or tuple(map(type, others)) != before or last.weight is None or last.bias is None:
        return None
    return last if len(last.normalized_shape) == 1 else None


def create_norm(
    channels: int,
    norm_layer: str = "layernorm",
    in_format: str = "NHWC",
    out_format: str = "NHWC",
    eps: float = 1e-6,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """A norm over channels, with layout changes before and after it as needed.

    Args:
        channels: Number of channels C.
        norm_layer: "layernorm" (over C, computed channels last) or "batchnorm" (computed channels first).
        in_format: Layout of the input, "NHWC" or "NCHW".
        out_format: Layout of the output, likewise.
        eps: Epsilon of the layer norm; batch norm keeps torch's 1e-5, as upstream does.
        device, dtype: Of the parameters.

    Returns:
        The sequence, with the norm at its official index.

    Raises:
        ValueError: Unknown `norm_layer` or layout.
    """
    change: dict[str, type[nn.Module]] = {"NHWC": ToChannelsLast, "NCHW": ToChannelsFirst}
    for name, layout in (("in_format", in_format), ("out_format", out_format)):
        if layout not in change:
            raise ValueError(f"{name} must be 'NHWC' or 'NCHW', got {layout!r}")
    if norm_layer == "layernorm":
        norm: nn.Module = LayerNorm(channels, eps=eps, device=device, dtype=dtype)
        works_in = "NHWC"
    elif norm_layer == "batchnorm":
        norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        works_in = "NCHW"
    else:
        raise ValueError(f"norm_layer must be 'layernorm' or 'batchnorm', got {norm_layer!r}")
    layers: list[nn.Module] = []
    if in_format != works_in:
        layers.append(change[works_in]())
    layers.append(norm)
    if out_format != works_in:
        layers.append(change[out_format]())
    return nn.Sequential(*layers)
