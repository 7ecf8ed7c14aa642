# SPDX-License-Identifier: MIT
"""Class probabilities of single images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions
from torch import nn

from .data import DataError
from .model import label_names


@dataclass
class Prediction:
    """The most likely classes of one image, best first."""

    name: str
    labels: list[str]
    indices: list[int]
    probabilities: list[float]


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files that paths name; a folder stands for all images below it, sorted.

    Raises:
        DataError: A path does not exist, or a folder holds no image.
    """
    extensions = get_img_extensions(as_set=True)
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions)
            if not inside:
                raise DataError(f"'{path}' holds no image; images end in {', '.join(get_img_extensions())}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image at '{path}'")
    return found


def read_image(source: str | Path | BinaryIO, name: str, mode: str = "RGB") -> Image.Image:
    """Open and decode an image.

    Raises:
        DataError: It is not an image, or damaged.
    """
    try:
        with Image.open(source) as image:
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise DataError(f"'{name}' is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"'{name}' cannot be read: {error}") from error


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Iterable[tuple[str, Image.Image]],
    config: dict,
    topk: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Prediction]:
    """Classify images one by one.

    Args:
        model: A classifier; is moved to `device` and `dtype` and left in eval mode.
        images: (name, image) pairs.
        config: timm's preprocessing, from `internimage.engine.model.data_config`.
        topk: How many classes to name.
        device, dtype: Where and in what the model runs.
    """
    model = model.to(device=device, dtype=dtype).eval()
    transform = create_transform(**config, is_training=False)
    names = label_names(model)
    for name, image in images:
        x = transform(image).unsqueeze(0).to(device=device, dtype=dtype)
        probabilities, indices = model(x).float().softmax(-1)[0].topk(min(topk, len(names)))
        yield Prediction(name, [names[i] for i in indices.tolist()], indices.tolist(), probabilities.tolist())
