# SPDX-License-Identifier: MIT
"""What stands in the masked part of an image."""

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from .maps import NodeError

FILLS = "median", "blur", "zero"


def fill_image(image: Tensor, fill: str | Tensor) -> Tensor:
    """The image that replaces another one where that is masked.

    Args:
        image: (1, C, H, W), preprocessed.
        fill: "median": the median of each channel. "blur": the image, blurred by a Gaussian whose standard deviation is
            an eighth of the shorter side. "zero": zeros, which is the mean color of the preprocessing. Or an image
            (C, H, W), (1, C, H, W), or a color (C,), preprocessed.

    Returns:
        (1, C, H, W).

    Raises:
        NodeError: It is none of these, or not finite.
    """
    if isinstance(fill, Tensor):
        return _given(image, fill)
    if fill == "median":
        return image.flatten(2).median(-1).values[..., None, None].expand_as(image)
    if fill == "blur":
        sigma = min(image.shape[2:]) / 8
        return gaussian_blur(image.float(), [2 * int(2.5 * sigma) + 1] * 2, [sigma] * 2).to(image.dtype)
    if fill == "zero":
        return torch.zeros_like(image)
    raise NodeError(f"fill must be {', '.join(map(repr, FILLS))} or an image as a tensor, got {fill!r}")


def name_of_fill(fill: str | Tensor) -> str:
    """For results: the fill, or that it was given."""
    if isinstance(fill, str):
        return fill
    return "color" if fill.dim() == 1 else "image"


def _given(image: Tensor, fill: Tensor) -> Tensor:
    channels = image.shape[1]
    shape = tuple(fill.shape)
    if shape not in ((channels,), tuple(image.shape[1:]), tuple(image.shape)):
        raise NodeError(f"fill must be a color ({channels},) or an image {tuple(image.shape[1:])}, got {shape}")
    if not fill.is_floating_point() or not torch.isfinite(fill).all():
        raise NodeError("fill must be finite floating-point numbers, preprocessed as the image")
    given = fill.detach().to(image.device, image.dtype)
    return given.view(1, channels, 1, 1).expand_as(image) if fill.dim() == 1 else given.view(image.shape)
