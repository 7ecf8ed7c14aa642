# SPDX-License-Identifier: MIT
"""Areas of an image, such as an object, that the numbers of a view are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .maps import NodeError

Area = Tensor | Sequence[float]
"""A mask (H, W) of the image's pixels, or a box (left, top, right, bottom) of their edges, as in Pillow."""


def as_mask(area: Area, height: int, width: int) -> Tensor:
    """An area as a mask (H, W) of bools on the CPU. A pixel is in a box if its center is.

    Raises:
        NodeError: It has another size, or is empty.
    """
    given = torch.as_tensor(area).detach().cpu()
    if given.dim() == 2:
        if given.shape != (height, width):
            raise NodeError(f"a mask must have the size of the image, {height} x {width}, got {tuple(given.shape)}")
        mask = given != 0
    elif given.shape == (4,):
        left, top, right, bottom = given.double().tolist()
        columns = torch.arange(width, dtype=torch.float64) + 0.5
        rows = torch.arange(height, dtype=torch.float64) + 0.5
        mask = ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
    else:
        raise NodeError(f"an area must be a mask (H, W) or a box of 4 numbers, got a shape {tuple(given.shape)}")
    if not mask.any():
        raise NodeError(f"an area must have pixels of the image of {width} x {height} pixels, got an empty one")
    return mask


def covering(locations: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels that locations (..., 2), as (x, y), are in.

    Returns:
        Rows and columns (...), int64, those of the nearest pixel for a location outside; and whether it is inside.
    """
    x, y = (locations + 0.5).floor().nan_to_num(-1, -1, -1).unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return y.clamp(0, height - 1).long(), x.clamp(0, width - 1).long(), inside


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN if there is no whole."""
    return part / whole if whole else float("nan")
