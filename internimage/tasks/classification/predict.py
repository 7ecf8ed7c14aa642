# SPDX-License-Identifier: MIT
"""Class probabilities of individual images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ...data import images as image_files
from ...data.datasets import EvaluationTransform
from ...data.images import COMMON_EXTENSIONS, DataError, ImageError, ignored_message, list_images, pixel_limit
from ...engine.finite import NotFiniteError, output_problem
from ...errors import list_some
from ...models.attributes import label_names
from ...progress import message


@dataclass
class Prediction:
    """The most likely classes of one image, best first."""

    name: str  #: of the image
    labels: list[str]  #: names of the classes
    indices: list[int]  #: indices of the classes
    probabilities: list[float]  #: of the classes, from 0 to 1


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files of the given paths. A folder means all images below it, sorted; its other files are reported.

    Raises:
        DataError: A path is empty, does not exist or is not a file; a folder contains no image or cannot be listed.
    """
    pixel_limit()  # an invalid value of its environment variable must not count as an unreadable image
    found: list[Path] = []
    for text in paths:
        path = Path(text)
        if str(text) == "":
            raise DataError("the name of an image is empty; the current folder is .")
        if path.is_dir():
            listing = list_images(path)
            if not listing.images:
                only = f" (only {list_some(listing.ignored, 5)})" if listing.ignored else ""
                raise DataError(f"'{path}' contains no image{only}; image files end in {COMMON_EXTENSIONS}")
            if listing.ignored:
                message(ignored_message(path, listing.ignored))
            found += sorted(path / name for name in listing.images)
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise DataError(f"'{path}' is not a regular file; an image on standard input is named -")
        else:
            raise DataError(f"there is no image at '{path}'")
    return found


def read_image(source: str | Path | BinaryIO, name: str, mode: str = "RGB") -> Image.Image:
    """Open and decode an image, and apply its Exif orientation.

    Args:
        source: Path or open binary file.
        name: What to call it in messages.
        mode: Pillow's mode to convert to, such as "RGB" or "L".

    Raises:
        DataError: It is not an image, is damaged, or is too large.
    """
    try:
        return image_files.read_image(source, mode)
    except ImageError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise DataError(f"'{name}' is not an image that Pillow can read ({error})") from error
        raise DataError(f"'{name}' cannot be read: {error}") from error


def image_mode(config: Mapping[str, Any]) -> str:
    """Pillow's mode of the images that a model takes, by timm's preprocessing."""
    return "L" if config["input_size"][0] == 1 else "RGB"


def preprocess(transform: EvaluationTransform, image: Image.Image, name: str) -> Tensor:
    """An image as the model takes it, (C, H, W).

    Raises:
        DataError: It is too long and narrow to be resized; the message has the name.
    """
    try:
        return transform(image)
    except ImageError as error:
        raise DataError(f"'{name}' cannot be read: {error}") from error


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Iterable[tuple[str, Image.Image]],
    config: dict[str, Any],
    topk: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    failed: Callable[[str, NotFiniteError | DataError], None] | None = None,
) -> Iterator[Prediction]:
    """Classify images one by one.

    Args:
        model: A classifier; is moved to `device` and `dtype` and left in eval mode.
        images: (name, image) pairs.
        config: timm's preprocessing, from `internimage.engine.create.data_config`.
        topk: The number of classes to return.
        device, dtype: Of the model.
        failed: Called with the name and the error of an image that cannot be resized or whose outputs are not finite;
            prediction then continues with the next image. Without it, or if the model's own weights are not finite,
            the error is raised.

    Raises:
        DataError: An image is too long and narrow to be resized.
        NotFiniteError: The model returned NaN or infinity.
    """
    model = model.to(device=device, dtype=dtype).eval()
    transform = EvaluationTransform(config)
    names = label_names(model)
    for name, image in images:
        try:
            x = preprocess(transform, image, name).unsqueeze(0).to(device=device, dtype=dtype)
        except DataError as unreadable:
            if failed is None:
                raise
            failed(name, unreadable)
            continue
        logits = model(x).float()
        problem = output_problem(logits, model, dtype)
        if problem is not None:
            if problem.weights or failed is None:
                raise problem
            failed(name, problem)
            continue
        probabilities, indices = logits.softmax(-1)[0].topk(min(topk, len(names)))
        yield Prediction(name, [names[i] for i in indices.tolist()], indices.tolist(), probabilities.tolist())
