# SPDX-License-Identifier: MIT
"""Maps of a model's layers: by name or stage, with their sizes and where their positions lie in the image."""

import difflib
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.attributes import name_of
from ..models.parts import stage_maps


class NodeError(UserError, ValueError):
    """A layer, class or position that a model does not have, or an argument of a view that is out of range."""


def whole_number(name: str, value: object, least: int, otherwise: str = "") -> int:
    """An argument that must be a whole number, of any type that is one; `otherwise` is what else the caller takes.

    Raises:
        NodeError: It is not, or smaller than allowed.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise NodeError(f"{name} must be a whole number from {least}{otherwise}, got {value!r}")
    return number


@dataclass(frozen=True)
class LayerMap:
    """The size of a layer's map, and of the image that it was computed from.

    A position covers `stride` image pixels, with its center in their middle. Coordinates are (x, y) = (column, row),
    and 0 is the center of the first pixel or position.

    Attributes:
        layer: Name of the module.
        channels: Of the map.
        height: Rows of the map.
        width: Columns of the map.
        image_height: Rows of the image.
        image_width: Columns of the image.
    """

    layer: str
    channels: int
    height: int
    width: int
    image_height: int
    image_width: int

    @property
    def stride(self) -> tuple[float, float]:
        """The image pixels of a position along x and y, which are the ratios of the sizes."""
        return self.image_width / self.width, self.image_height / self.height

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        """The image pixel at the center of a position."""
        stride_x, stride_y = self.stride
        return (x + 0.5) * stride_x - 0.5, (y + 0.5) * stride_y - 0.5

    def from_image(self, x: float, y: float) -> tuple[int, int]:
        """The position that covers an image pixel.

        Raises:
            NodeError: The pixel is outside the image.
        """
        if not (-0.5 <= x < self.image_width - 0.5 and -0.5 <= y < self.image_height - 0.5):
            raise NodeError(
                f"a pixel must be inside the image of {self.image_width} x {self.image_height} pixels, got ({x}, {y})"
            )
        stride_x, stride_y = self.stride
        return min(int((x + 0.5) / stride_x), self.width - 1), min(int((y + 0.5) / stride_y), self.height - 1)


class MapReader:
    """Computes the map of a layer, up to that layer.

    Args:
        model: Any model; stages need timm's `feature_info`.
        layer: Name of a module, a stage from 1, or None for the last stage. A module that is called several times in a
            forward pass stands for its first call.

    Raises:
        NodeError: The model has no such layer or stage; the message names the nearest ones.
    """

    def __init__(self, model: nn.Module, layer: str | int | None) -> None:
        self.model = model
        self.name, self._index = _find(model, layer)
        self._channels_last: bool | None = None  # of what the module gives, once it is known

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> map (N, height, width, channels), differentiable.

        Raises:
            NodeError: The layer is not called, or gives no map.
        """
        if self._index is not None:
            forward: Any = self.model.forward_intermediates
            (found,) = forward(images, indices=[self._index], stop_early=True, intermediates_only=True)
            return self._checked(found).permute(0, 2, 3, 1)
        found = self._checked(_output(self.model, self.name, images))
        if self._channels_last is None:
            self._channels_last = self._is_channels_last(found, images)
        return found if self._channels_last else found.permute(0, 2, 3, 1)

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise NodeError(f"'{self.name}' of '{name_of(self.model)}' gives no map, but {type(output).__name__}")
        if output.dim() != 4:
            raise NodeError(f"'{self.name}' of '{name_of(self.model)}' gives no map, but a shape {tuple(output.shape)}")
        return output

    def _is_channels_last(self, output: Tensor, images: Tensor) -> bool:
        """Whether the map is (N, h, w, C): an image pixel is as wide as high in the one layout and not in the other."""
        height, width = images.shape[2:]
        _, a, b, c = output.shape
        if 0 in output.shape:
            raise NodeError(f"'{self.name}' gives an empty map for an image of {width} x {height} pixels")
        last, first = (abs(math.log(height * w / (width * h))) for h, w in ((a, b), (b, c)))
        if last != first:
            return last < first
        # as many channels as rows and columns: of a higher image, the map is higher
        with torch.no_grad():
            try:
                taller = _output(self.model, self.name, images.new_zeros(1, images.shape[1], 2 * height, width))
            except (RuntimeError, ValueError, AssertionError) as error:
                raise NodeError(
                    f"the layout of the map of '{self.name}', {a} x {b} x {c}, cannot be told: name a stage, or take "
                    f"an image of another size"
                ) from error
        return bool(taller.shape[1] != a)

    def size(self, output: Tensor, images: Tensor) -> LayerMap:
        """The sizes of a map that was computed from images."""
        _, height, width, channels = output.shape
        return LayerMap(self.name, channels, height, width, images.shape[2], images.shape[3])


def _find(model: nn.Module, layer: str | int | None) -> tuple[str, int | None]:
    """The name of a layer's module, and the index of its map for `forward_intermediates` if it has one."""
    stages = stage_maps(model)
    if isinstance(layer, str):
        modules = [name for name, _ in model.named_modules() if name]
        if layer not in modules:
            near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.4)
            near = near or [name for _, name in stages] or modules[:3]
            raise NodeError(f"'{name_of(model)}' has no layer '{layer}'; near ones are {', '.join(near)}")
        index = next((index for index, name in stages if name == layer), None)
    else:
        if layer is None:
            layer = len(stages)
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise NodeError(f"layer must be the name of a module or the number of a stage, got {layer!r}")
        if not stages:
            raise NodeError(f"'{name_of(model)}' has no stages (timm's feature_info): name a layer")
        if not 1 <= layer <= len(stages):
            raise NodeError(f"'{name_of(model)}' has stages 1 to {len(stages)}, got {layer}")
        index, layer = stages[layer - 1]
    return layer, index if callable(getattr(model, "forward_intermediates", None)) else None


class _Reached(Exception):
    """Ends a forward pass at a layer."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _output(model: nn.Module, name: str, images: Tensor) -> Any:
    """What a module gives, without computing what comes after it."""

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(output)

    handle = model.get_submodule(name).register_forward_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise NodeError(f"'{name}' of '{name_of(model)}' is not called in a forward pass: name one that is")
