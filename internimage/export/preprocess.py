# SPDX-License-Identifier: MIT
"""A classifier with its preprocessing: bytes of an image of any size in, probabilities out."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .description import ExportError

_MODES = {"bicubic": "bicubic", "bilinear": "bilinear"}


class FromBytes(nn.Module):
    """uint8 (N, height, width, 3), RGB -> probabilities (N, classes).

    As timm does it: the shorter side is resized, antialiased, to the size that the crop is a share of; the middle is
    cropped; then normalized. Shades are rounded after resizing, as Pillow's are, which differ by at most one of 255.

    Args:
        model: A classifier of three channels.
        config: timm's preprocessing.

    Raises:
        ExportError: The model takes another number of channels, or timm's preprocessing is of another kind.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels, height, width = config["input_size"]
        if channels != 3:
            raise ExportError(
                f"preprocessing within the file is for RGB images, and this model takes {channels} channel"
            )
        if config.get("crop_mode") not in (None, "", "center") or height != width:
            raise ExportError(
                f"preprocessing within the file resizes the shorter side and crops a square, and this model has "
                f"crop_mode '{config.get('crop_mode')}' and {height} x {width} pixels"
            )
        if config["interpolation"] not in _MODES:
            raise ExportError(
                f"preprocessing within the file has {' and '.join(_MODES)} interpolation, and this model "
                f"'{config['interpolation']}'"
            )
        self.model, self.side, self.mode = model, int(height), _MODES[config["interpolation"]]
        self.resized = int(height / float(config["crop_pct"]))  # rounded down, as timm does
        self.register_buffer("mean", 255 * torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def preprocess(self, image: Tensor) -> Tensor:
        """uint8 (N, height, width, 3) -> normalized (N, 3, side, side)."""
        height, width = image.shape[1], image.shape[2]
        shorter = torch.sym_min(height, width)
        size: Any = (height * self.resized // shorter, width * self.resized // shorter)  # symbols while it is traced
        shades = image.permute(0, 3, 1, 2).float()
        shades = F.interpolate(shades, size, mode=self.mode, antialias=True).round().clamp(0, 255)
        # torchvision rounds half to even, as Python does; both are the lower one of the two middle positions or above
        top, left = (_middle(side, self.side) for side in size)
        shades = shades[:, :, top : top + self.side, left : left + self.side]
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (shades - mean) / std

    def forward(self, image: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        probabilities: Tensor = self.model(self.preprocess(image).to(parameter.dtype)).float().softmax(-1)
        return probabilities


def _middle(side: Any, kept: int) -> Any:
    """round((side - kept) / 2), half to even, in whole numbers that can be traced."""
    twice = side - kept
    half = twice // 2
    return half + (twice % 2) * (half % 2)
