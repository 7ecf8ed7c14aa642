# SPDX-License-Identifier: MIT
"""Sampled points of DCNv3 layers, as numbers and drawn over images."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from timm.data import create_transform
from torch import Tensor, nn

from ..errors import UserError
from ..files import writing
from ..layers.dcn import DCNv3

_TILE = 224  # side of one drawn image in pixels
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45")


def dcnv3_layers(model: nn.Module) -> dict[str, DCNv3]:
    """The DCNv3 layers of a model by name, in order of execution."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DCNv3)}


@torch.inference_mode()
def sampled_points(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[str, Tensor, Tensor]:
    """Where a layer samples, in pixels of the model's input.

    Args:
        model: A model with DCNv3 layers.
        images: (N, C, H, W), preprocessed.
        layer: Name of the layer; None takes the last one of stage 3.

    Returns:
        The layer's name; locations (N, Ho, Wo, groups, P, 2) as (x, y), where 0 is the centre of the first pixel; and
        weights (N, Ho, Wo, groups, P).

    Raises:
        UserError: The model has no such layer.
    """
    layers = dcnv3_layers(model)
    if layer is None:
        candidates = [name for name in layers if name.startswith("levels.2.")] or list(layers)
        layer = candidates[-1] if candidates else "(any)"
    if layer not in layers:
        some = ", ".join(list(layers)[:3]) + ", ..." if layers else "none"
        raise UserError(f"the model has no DCNv3 layer '{layer}'; it has {some}")
    seen = []
    handle = layers[layer].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    (x,) = seen
    location, weight = layers[layer].sampling(x)
    # a feature pixel covers `stride` image pixels, with its centre in their middle
    stride = torch.tensor([images.shape[3] / x.shape[2], images.shape[2] / x.shape[1]], device=location.device)
    return layer, (location.float() + 0.5) * stride - 0.5, weight.float()


def draw_points(
    model: nn.Module,
    images: list[tuple[str, Image.Image]],
    config: dict,
    path: str | Path,
    layer: str | None = None,
) -> str:
    """Draw the points that the output pixel in the middle of each image is computed from.

    One tile an image: a cross marks the output pixel, a dot each sampled point, its colour the group and its size the
    weight.

    Args:
        model: A model with DCNv3 layers.
        images: (name, image) pairs.
        config: timm's preprocessing.
        path: PNG file to write.
        layer: As in `sampled_points`.

    Returns:
        The layer's name.
    """
    parameter = next(model.parameters())
    transform = create_transform(**config, is_training=False)
    batch = torch.stack([transform(image) for _, image in images]).to(parameter.device, parameter.dtype)
    layer, locations, weights = sampled_points(model.eval(), batch, layer)
    mean = torch.tensor(config["mean"]).view(-1, 1, 1)
    std = torch.tensor(config["std"]).view(-1, 1, 1)
    shown = ((batch.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    height, width = batch.shape[2:]
    scale = _TILE / max(height, width)
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (_TILE + 8) + 8, rows * (_TILE + 8) + 8), "white")
    for i in range(len(images)):
        pixels = shown[i].expand(3, -1, -1).permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        _, ho, wo, groups, points, _ = locations.shape
        oy, ox = ho // 2, wo // 2
        for group in range(groups):
            for point in range(points):
                x, y = ((locations[i, oy, ox, group, point].cpu() + 0.5) * scale).tolist()
                radius = 1.5 + 12 * weights[i, oy, ox, group, point].item()
                box = [x - radius, y - radius, x + radius, y + radius]
                draw.ellipse(box, fill=_COLORS[group % len(_COLORS)], outline="white")
        x, y = (ox + 0.5) * width / wo * scale, (oy + 0.5) * height / ho * scale
        for color, arm, thickness in (("black", 9, 5), ("yellow", 7, 2)):  # seen on any background
            draw.line([x - arm, y, x + arm, y], fill=color, width=thickness)
            draw.line([x, y - arm, x, y + arm], fill=color, width=thickness)
        sheet.paste(tile, (8 + (i % columns) * (_TILE + 8), 8 + (i // columns) * (_TILE + 8)))
    with writing(path) as file:  # a pipe has no ending that would name a format
        kind = Image.registered_extensions().get(Path(path).suffix.lower())
        sheet.save(file, kind if kind in Image.SAVE else "PNG")
    return layer
