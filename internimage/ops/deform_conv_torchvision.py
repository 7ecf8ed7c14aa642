# SPDX-License-Identifier: MIT
"""Deformable convolution on CUDA and MPS by torchvision's kernels, in the cases that they take.

`register` puts them behind `torch.ops.internimage.deform_conv2d` and its backward on these devices. The rest is
`deform_conv_reference`: gradients of gradients, the deterministic backward (torchvision's adds atomically), and devices
that torchvision has no kernels for. What is outside the image is as in the reference: torchvision would return NaN for
an offset that is NaN, and has a gradient for a location at exactly -1. Half types are computed in float32: it has no
bfloat16, and would round locations to float16, to a 32nd of a pixel from 32 pixels on.
"""

from typing import Any

import torch
from torch import Tensor

from . import deform_conv_reference as reference
from .registration import library
from .sampling import CONVOLUTION, Geometry, accumulate_dtype, sampling_coordinates

_DEVICES = ("CUDA", "MPS")


def register() -> None:
    """Register `forward` and `backward` for the devices."""
    for device in _DEVICES:
        library.impl("deform_conv2d", forward, device)
        library.impl("deform_conv2d_backward", backward, device)


def _has_kernel(name: str, device: str) -> bool:
    """Whether torchvision has a kernel of an operator for a device type."""
    try:
        import torchvision  # noqa: F401  (defines its operators)
    except Exception:  # a build for another torch, for example; plain torch serves then
        return False
    has: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", device.upper())
    return has


def forward(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> Tensor:
    """The output; arguments as of `deform_conv_reference.forward`."""
    if input.numel() == 0 or not _has_kernel("deform_conv2d", input.device.type):
        return reference.forward(input, offset, mask, weight, bias, *arguments)
    tensors = [t.to(accumulate_dtype(input.dtype)) for t in (input, offset, mask, weight, bias)]
    _, offset, mask = _inside_only(*tensors[:4], *arguments)
    output = torch.ops.torchvision.deform_conv2d(
        tensors[0], tensors[3], offset, mask, tensors[4], *_flat(arguments), True
    )
    return reference.like(output, input)


def backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients; arguments as of `deform_conv_reference.backward`."""
    *others, deterministic, output_mask = arguments
    given = input, offset, mask, weight, bias
    if deterministic or input.numel() == 0 or not _has_kernel("_deform_conv2d_backward", input.device.type):
        return reference.backward(grad_output, *given, *arguments)
    grad, *tensors = (t.to(accumulate_dtype(input.dtype)) for t in (grad_output, *given))
    inside, offset, mask = _inside_only(*tensors[:4], *others)
    of_input, of_weight, of_offset, of_mask, of_bias = torch.ops.torchvision._deform_conv2d_backward(
        grad.contiguous(), tensors[0], tensors[3], offset, mask, tensors[4], *_flat(others), True
    )
    of_offset = of_offset.where(inside.repeat_interleave(2, 1), 0)
    of_mask = of_mask.where(inside, 0)
    return tuple(
        reference.like(g, t) if wanted else t.new_empty(0)
        for g, t, wanted in zip((of_input, of_offset, of_mask, of_weight, of_bias), given, output_mask)
    )


def _flat(arguments: Any) -> list[int]:
    """Arguments of our schema in the order of torchvision's."""
    stride, padding, dilation, groups, offset_groups = arguments
    return [*stride, *padding, *dilation, groups, offset_groups]


def _inside_only(
    input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether locations are inside, (N, offset groups * P, Ho, Wo), and offset and mask without the others.

    Their offsets become finite and so large that torchvision takes them for outside, their masks 0.
    """
    stride, padding, dilation, _, offset_groups = arguments
    _, _, height, width = weight.shape
    geometry = Geometry((height, width), stride, padding, dilation, offset_groups, 1.0, False, False)
    x, y = sampling_coordinates(offset.permute(0, 2, 3, 1), geometry, CONVOLUTION)
    inside = (x > -1) & (x < input.shape[3]) & (y > -1) & (y < input.shape[2])
    inside = inside.flatten(3).permute(0, 3, 1, 2)
    far = torch.finfo(offset.dtype).min / 2
    return inside, offset.where(inside.repeat_interleave(2, 1), far), mask.where(inside, 0)
