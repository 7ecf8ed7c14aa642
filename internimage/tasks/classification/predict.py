# SPDX-License-Identifier: MIT
"""Class probabilities of single images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from ...data import images as image_files
from ...data.datasets import EvaluationTransform
from ...data.images import USUAL_ENDINGS, DataError, ImageError, ignored_message, list_images, most_pixels
from ...engine.create import label_names
from ...engine.finite import NotFiniteError, output_problem
from ...progress import message


@dataclass
class Prediction:
    """The most likely classes of one image, best first."""

    name: str  #: of the image
    labels: list[str]  #: names of the classes
    indices: list[int]  #: indices of the classes
    probabilities: list[float]  #: of the classes, from 0 to 1


def find_images(paths: Iterable[str]) -> list[Path]:
    """The image files that paths name; a folder stands for all images below it, sorted. Its other files are told.

    Raises:
        DataError: A path is empty, does not exist or is no file; a folder holds no image or cannot be listed.
    """
    most_pixels()  # a value of its variable that is wrong is no matter of any image
    found = []
    for name in paths:
        path = Path(name)
        if str(name) == "":
            raise DataError("the name of an image is empty; the folder that you are in is .")
        if path.is_dir():
            listing = list_images(path)
            if not listing.images:
                there = f" (only {ignored_message(path, listing.ignored)})" if listing.ignored else ""
                raise DataError(f"'{path}' holds no image{there}; images end in {USUAL_ENDINGS}")
            if listing.ignored:
                message(ignored_message(path, listing.ignored))
            found += sorted(path / inside for inside in listing.images)
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise DataError(f"'{path}' is not a regular file; an image on standard input is named -")
        else:
            raise DataError(f"there is no image at '{path}'")
    return found


def read_image(source: str | Path | BinaryIO, name: str, mode: str = "RGB") -> Image.Image:
    """Open and decode an image; it is turned as its Exif data say.

    Raises:
        DataError: It is not an image, damaged, or too large.
    """
    try:
        return image_files.read_image(source, mode)
    except ImageError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise DataError(f"'{name}' is not an image that Pillow can read ({error})") from error
        raise DataError(f"'{name}' cannot be read: {error}") from error


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Iterable[tuple[str, Image.Image]],
    config: dict,
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
        topk: How many classes to name.
        device, dtype: Where and in what the model runs.
        failed: Is called with the name of an image that cannot be resized or whose outputs are not finite, and the
            others go on; without it, or if the model's own weights are not finite, the error is raised.

    Raises:
        DataError: An image is too long and narrow to be resized.
        NotFiniteError: The model gave NaN or infinity.
    """
    model = model.to(device=device, dtype=dtype).eval()
    transform = EvaluationTransform(config)
    names = label_names(model)
    for name, image in images:
        try:
            x = transform(image).unsqueeze(0).to(device=device, dtype=dtype)
        except ImageError as error:
            problem = DataError(f"'{name}' cannot be read: {error}")
            if failed is None:
                raise problem from error
            failed(name, problem)
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
