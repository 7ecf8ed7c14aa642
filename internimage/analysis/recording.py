# SPDX-License-Identifier: MIT
"""Records where the deformable layers of a model sample during a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.deform_conv import DeformConv2d
from ..layers.sampling import PredictsOffsets
from ..models.attributes import name_of
from ..models.parts import NoSuchParts, offset_layers
from ..ops.deform_conv import deform_conv2d


class SampledLayer:
    """Where a layer has sampled an image.

    Args:
        name: Of the layer.
        layer: The layer, or one of the same geometry.
        predicted: Its offsets, as the layer's `offset_module` gives them.
        input_size: (height, width) of its input.
        image_size: (height, width) of the image.
        deformable: False for a plain convolution.

    Attributes:
        input_stride: Image pixels per pixel of the layer's input, (x, y).
        output_stride: Image pixels per output pixel, (x, y).
        locations: (Ho, Wo, groups, P, 2) as (x, y) in image pixels, on the layer's device.
        zeros: What was added to the offsets, for their gradient; None without autograd.
        kernel_points: Column and row of each point in the kernel.
    """

    def __init__(
        self,
        name: str,
        layer: PredictsOffsets,
        predicted: Tensor,
        input_size: tuple[int, int],
        image_size: tuple[int, int],
        deformable: bool = True,
    ) -> None:
        self.name, self.layer, self.deformable = name, layer, deformable
        self.zeros = torch.zeros_like(predicted).requires_grad_() if torch.is_grad_enabled() else None
        (height, width), (rows, columns) = image_size, input_size
        self.input_stride = width / columns, height / rows
        locations = layer.locations(predicted.detach())[0]
        self.output_stride = width / locations.shape[1], height / locations.shape[0]
        self.locations = (locations + 0.5) * locations.new_tensor(self.input_stride) - 0.5
        self.kernel_points = layer.kernel_points()

    def location_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the locations in image pixels, from that with respect to `zeros`."""
        found = self.layer.location_gradient(gradient)[0]
        return found / found.new_tensor(self.input_stride)


@contextmanager
def recorded(model: nn.Module, image: Tensor, plain: bool) -> Iterator[list[SampledLayer]]:
    """Record the layers of each forward pass inside, in the order in which they sample.

    With autograd, zeros that require a gradient are added to the offsets of every layer.

    Args:
        model: With deformable layers.
        image: (1, C, H, W).
        plain: Also the model's plain 3x3 convolutions, as deformable ones with zero offsets.

    Raises:
        NoSuchParts: The model has no such layers.
    """
    layers = offset_layers(model)
    convolutions = _plain_convolutions(model) if plain else {}
    if not layers and not convolutions:
        instead = "and no plain 3x3 convolutions" if plain else "(plain=True takes its plain 3x3 convolutions)"
        raise NoSuchParts(
            f"'{name_of(model)}' has no deformable layers {instead}, so there is no view of its sampling points; those "
            f"of the receptive field and of the saliency region work"
        )
    image_size = image.shape[2], image.shape[3]
    found: list[SampledLayer] = []
    handles = []
    for name, layer in layers.items():
        handles += _record_deformable(name, layer, image_size, found)
    for name, conv in convolutions.items():
        handles.append(_record_plain(name, conv, image_size, found))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _record_deformable(name: str, layer: Any, image_size: tuple[int, int], found: list[SampledLayer]) -> list[Any]:
    sizes: list[tuple[int, int]] = []

    def before(module: Any, inputs: Any) -> None:
        sizes.append(module.input_size(inputs[0]))

    def after(module: nn.Module, inputs: Any, predicted: Tensor) -> Tensor:
        sampled = SampledLayer(name, layer, predicted, sizes[-1], image_size)
        found.append(sampled)
        return predicted if sampled.zeros is None else predicted + sampled.zeros

    return [layer.register_forward_pre_hook(before), layer.offset_module().register_forward_hook(after)]


def _record_plain(name: str, conv: nn.Conv2d, image_size: tuple[int, int], found: list[SampledLayer]) -> Any:
    window: Any = conv.stride, conv.padding, conv.dilation
    stride, padding, dilation = window
    geometry = DeformConv2d(1, 1, 3, stride, padding, dilation, device="meta")

    def after(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        x = inputs[0]
        zeros = x.new_zeros(x.shape[0], 18, output.shape[2], output.shape[3])
        sampled = SampledLayer(name, geometry, zeros, (x.shape[2], x.shape[3]), image_size, deformable=False)
        found.append(sampled)
        if sampled.zeros is None:
            return output
        return deform_conv2d(x, sampled.zeros, conv.weight, conv.bias, *window)

    return conv.register_forward_hook(after)


def _plain_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The 3x3 convolutions with zeros as padding, but for those that are parts of a deformable layer."""
    deformable: list[Any] = list(offset_layers(model).values())
    inside = {id(part) for layer in deformable for part in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and id(module) not in inside
        and module.kernel_size == (3, 3)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    }
