# SPDX-License-Identifier: MIT
"""Where a preprocessed image lies in the given one: pixels carried through resize and crop, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio, TrimBorder
from torchvision.transforms import CenterCrop, Resize

from .datasets import EvaluationTransform
from .images import DataError

_RESIZES = Resize, ResizeKeepRatio
_CROPS = CenterCrop, CenterCropOrPad, TrimBorder
_FLAG = 1  # third color of pixels that were in the image before a crop; what pads has another


@dataclass(frozen=True)
class Placement:
    """Coordinates are (x, y) = (column, row), and 0 is the center of the first pixel.

    Attributes:
        width: Of the given image.
        height: Of the given image.
        model_width: Of the preprocessed image.
        model_height: Of the preprocessed image.
        scale: Preprocessed pixels per given pixel, along x and y.
        shift: Preprocessed pixels from the left and upper edge of the preprocessed image to those of the given one;
            negative where it is cropped.
    """

    width: int
    height: int
    model_width: int
    model_height: int
    scale: tuple[float, float]
    shift: tuple[float, float]

    def to_model(self, x: float, y: float) -> tuple[float, float]:
        """A place in the given image -> in the preprocessed one, which may be outside of it."""
        return (
            (x + 0.5) * self.scale[0] + self.shift[0] - 0.5,
            (y + 0.5) * self.scale[1] + self.shift[1] - 0.5,
        )

    def from_model(self, x: float, y: float) -> tuple[float, float]:
        """A place in the preprocessed image -> in the given one."""
        return (
            (x + 0.5 - self.shift[0]) / self.scale[0] - 0.5,
            (y + 0.5 - self.shift[1]) / self.scale[1] - 0.5,
        )

    def seen(self) -> tuple[int, int, int, int]:
        """The first and last column, and the first and last row, of the given image whose centers the model sees."""
        ranges = []
        for size, model, scale, shift in zip(
            (self.width, self.height), (self.model_width, self.model_height), self.scale, self.shift
        ):
            centers = (np.arange(size) + 0.5) * scale + shift
            (inside,) = np.nonzero((centers >= 0) & (centers < model))
            ranges += [int(inside[0]), int(inside[-1])] if len(inside) else [0, -1]
        return ranges[0], ranges[1], ranges[2], ranges[3]

    def checked(self, x: float, y: float) -> tuple[float, float]:
        """A pixel of the given image -> its place in the preprocessed one.

        Raises:
            DataError: It is outside the given image, or in the part that the crop removes.
        """
        if not (-0.5 <= x < self.width - 0.5 and -0.5 <= y < self.height - 0.5):
            raise DataError(f"the pixel {x:g},{y:g} is outside the image of {self.width} x {self.height} pixels")
        there = self.to_model(x, y)
        if not (-0.5 <= there[0] < self.model_width - 0.5 and -0.5 <= there[1] < self.model_height - 0.5):
            left, right, top, bottom = self.seen()
            raise DataError(
                f"the pixel {x:g},{y:g} is in the part that the crop removes: the model sees columns {left} to {right} "
                f"and rows {top} to {bottom} of this image"
            )
        return there


def placement(config: dict[str, Any], image: Image.Image) -> Placement:
    """Where the preprocessing places an image.

    Args:
        config: timm's preprocessing.
        image: As given.

    Raises:
        DataError: The preprocessing moves pixels in another way than by resizing and cropping.
    """
    size, scale, shift = image.size, np.ones(2), np.zeros(2)
    for step in EvaluationTransform(config).transform.transforms:
        if isinstance(step, _RESIZES):
            resized = step(Image.new("RGB", size)).size
            factor = np.array(resized) / np.array(size)
            size, scale, shift = resized, scale * factor, shift * factor
        elif isinstance(step, _CROPS):
            moved, size = _moved(step, size)
            shift = shift + moved
        elif type(step).__name__ in ("MaybeToTensor", "ToTensor"):
            break  # what follows leaves pixels in their places
        else:
            raise DataError(f"pixels cannot be carried through '{type(step).__name__}' of the preprocessing")
    return Placement(
        *image.size, *size, scale=(float(scale[0]), float(scale[1])), shift=(float(shift[0]), float(shift[1]))
    )


def _moved(crop: Any, size: tuple[int, int]) -> tuple["np.ndarray[Any, Any]", tuple[int, int]]:
    """How far a crop moves pixels, and the size of the result: tried on an image whose pixels are their own places."""
    moves, cropped = [], size
    for axis in (0, 1):
        line = np.arange(size[axis], dtype=np.int32)
        colors = np.stack([line % 256, line // 256, np.full_like(line, _FLAG)], axis=-1).astype(np.uint8)
        shape = (size[1], size[0], 3)
        probe = np.broadcast_to(colors[None] if axis == 0 else colors[:, None], shape)
        result = crop(Image.fromarray(np.ascontiguousarray(probe)))
        cropped = result.size
        found = np.asarray(result)
        row, column = (int(places[0]) for places in np.nonzero(found[..., 2] == _FLAG))
        low, high = found[row, column, :2].tolist()
        moves.append((column, row)[axis] - (low + 256 * high))
    return np.array(moves, dtype=float), cropped
