# SPDX-License-Identifier: MIT
"""What the layers that sample compute while `torch.onnx.export` traces them; see `ops.onnx_forms`."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import onnx_forms
from ..ops.sampling import CONVOLUTION, DCNV3, Geometry
from .fast_path import has_hooks


def _predict(
    layer: Any, kind: type[nn.Module], function: Callable[..., Tensor], input: Tensor, outputs: onnx_forms.Outputs,
    dim: int,
) -> Tensor:  # fmt: skip
    """What a layer predicts, changed: in its parameters, if it is of the kind that computes `function` with these."""
    # not by its type: torch.export shows every module as one of a class of its own, derived from the module's
    is_known = isinstance(layer, kind) and type(layer).forward is kind.forward and not has_hooks(layer)
    if not is_known or layer.bias is None:
        return outputs.of_map(layer(input), dim)
    return function(input, *outputs.of_parameters(layer.weight, layer.bias))


def dcnv3(layer: Any, projected: Tensor, query: Tensor, linear: type[nn.Module]) -> Tensor:
    """What `DCNv3` samples.

    Args:
        layer: The DCNv3.
        projected: (N, H, W, C), from its `input_proj`.
        query: (N, Ho, Wo, C), from its `query`.
        linear: The class of its `offset` and `mask`, unless they were replaced.

    Returns:
        (N, Ho, Wo, C).
    """
    form, geometry = onnx_forms.current_form(), layer.geometry
    changes = form.offsets(geometry, DCNV3), form.masks(geometry, DCNV3)
    offset, mask = (
        _predict(predictor, linear, F.linear, query, change, -1)
        for predictor, change in zip((layer.offset, layer.mask), changes)
    )
    return form.dcnv3(projected, offset, mask, geometry)


def deform_conv2d(layer: Any, input: Tensor, convolution: type[nn.Module]) -> Tensor:
    """What `DeformConv2d` and `ModulatedDeformConv2d` compute.

    Args:
        layer: The layer.
        input: (N, in_channels, H, W).
        convolution: The class of its `conv_offset`, unless that was replaced.

    Returns:
        (N, out_channels, Ho, Wo).
    """
    form, window = onnx_forms.current_form(), (layer.stride, layer.padding, layer.dilation)
    geometry = Geometry(layer.kernel_size, *window, layer.offset_groups, 1.0, False, False)
    points = layer.offset_groups * layer.kernel_size[0] * layer.kernel_size[1]
    outputs = form.offsets(geometry, CONVOLUTION)
    if layer.modulated:
        outputs = outputs.followed_by(2 * points, points)

    def convolve(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(input, weight, bias, *window)

    predicted = _predict(layer.conv_offset, convolution, convolve, input, outputs, 1)
    mask = predicted[:, 2 * points :].sigmoid() if layer.modulated else None
    return form.deform_conv2d(
        input, predicted[:, : 2 * points], mask, layer.weight, layer.bias, *window, layer.groups, layer.offset_groups
    )
