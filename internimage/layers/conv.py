# SPDX-License-Identifier: MIT
"""Convolution, channels last, with packed weights in CPU inference. Parameters and results are torch's."""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..extension import has_kernel
from ..ops.onednn import has_operator, has_product, multiplied_in
from ..ops.transforms import is_transformed
from .fast_path import use_fast_path
from .packing import PacksWeights, Snapshot

# The operator behind torch.compile's fused convolutions. It is not public, so its schema is checked.
_CONVOLUTION = (
    "mkldnn::_convolution_pointwise(Tensor X, Tensor W, Tensor? B, int[] padding, int[] stride, int[] dilation, "
    "int groups, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
_CAN_PACK = has_operator("_convolution_pointwise", _CONVOLUTION) and hasattr(
    torch._C._nn, "mkldnn_reorder_conv2d_weight"
)


class _Packed:
    """The packed weight of a convolution, for inputs of one dtype."""

    def __init__(self, conv: nn.Conv2d, x: Tensor) -> None:
        self.weight = conv.weight
        with torch.no_grad():
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # whose stub lacks arguments
            self.tensor: Tensor = reorder(
                conv.weight.to(multiplied_in(x.dtype)).to_mkldnn(),
                conv.padding,
                conv.stride,
                conv.dilation,
                conv.groups,
                x.shape,
            )
        self._snapshot = Snapshot([conv.weight], [conv.weight])

    def is_current(self, conv: nn.Conv2d) -> bool:
        return conv.weight is self.weight and self._snapshot.is_current()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the layer makes its own


@register_notrace_module  # a leaf of timm's FX graphs, whose results then match those of the model bit for bit
class Conv2d(PacksWeights, nn.Conv2d):
    """torch's convolution of a channels-last tensor; CPU inference keeps the packed weight."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._packed: _Packed | None = None

    def clear_packed(self) -> None:
        """Drop the packed weight; the next call in eval mode makes one."""
        self._packed = None

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_transformed():  # vmap has no layouts
                return self._conv_forward(input, self.weight, self.bias)
        input = input.contiguous(memory_format=torch.channels_last)
        if not torch.jit.is_scripting():
            if self._can_pack(input):
                return self._forward_packed(input)
        return self._conv_forward(input, self.weight, self.bias)

    @torch.jit.unused
    def _can_pack(self, x: Tensor) -> bool:
        return (
            _CAN_PACK
            and self.pack_weights
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not self.training
            and use_fast_path(x, self.weight, self.bias)
            and has_product(multiplied_in(x.dtype))
            and x.numel() > 0
            and not self.weight.is_inference()
            and self.weight.is_contiguous()
            and has_kernel("fingerprint", "cpu")
        )

    @torch.jit.unused
    def _forward_packed(self, x: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or not packed.is_current(self):
            packed = self._packed = _Packed(self, x)
        dtype = multiplied_in(x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        output = torch.ops.mkldnn._convolution_pointwise.default(
            x.to(dtype), packed.tensor, bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )
        return output.to(x.dtype)
