# SPDX-License-Identifier: MIT
"""Data for evaluation: timm's datasets, opened with checks and read so that a corrupt image is named, not replaced."""

import importlib.util
import os
import re
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import one_line, some
from ..progress import message
from .image_sets import choose_folder, find_split, open_folder, read_class_map, split_names
from .image_tars import open_tar
from .images import DataError, ImageError, convert_image, ignored_message, most_pixels, read_image, why

__all__ = [
    "Batch", "DataError", "EvaluationTransform", "GuardedDataset", "class_difference", "class_names", "find_split",
    "open_dataset",
]  # fmt: skip

# timm's names; the first have two splits, and any word but train means the other one
_TORCH_PAIRS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_TORCH_OTHERS = ("imagenet", "inat", "inaturalist", "places365")
_STREAMED = ("hfids", "tfds", "wds")


def open_dataset(
    root: str | Path,
    split: str = "validation",
    name: str = "",
    class_map: str | Path | None = None,
) -> Dataset:
    """A map-style dataset of timm or torchvision, checked before anything is computed.

    It reads images as RGB; set its `input_img_mode` to "L" for grey ones. Its `upright` says whether images are turned
    as their Exif data say: they are not where the classes are ImageNet's synsets, because published accuracies were
    measured without. Files that are left out are told on stderr.

    Args:
        root: Folder of class folders, with or without a folder for each split; a tar of such; or the root that the
            dataset called `name` wants.
        split: For a folder or tar, `train`, `validation` (`val`), `test` or any folder name; else the dataset's own
            word.
        name: timm's name of a dataset, `hfds/OWNER/NAME` or `torch/NAME`; empty for folders and tars.
        class_map: File with a class name a line, in the model's order, for folders that lack some of its classes.

    Raises:
        DataError: It cannot be opened; the message says what is missing.
    """
    if str(root) == "":
        raise DataError("the name of the data's folder is empty")
    mapping = None if class_map is None else read_class_map(class_map)
    if name:
        return _open_named(name, str(root), split or "validation", mapping)
    root = Path(root)
    if root.is_dir():
        place = choose_folder(root, split)
        reader, ignored = open_folder(place, mapping)
    elif not root.exists():
        raise DataError(f"there is no dataset at '{root}'")
    elif root.is_file() and root.suffix.lower() == ".tar":
        place = root
        reader, ignored = open_tar(root, split, mapping)
    else:
        packed = re.search(r"\.(tgz|tbz2?|txz|zip|rar|7z|(tar)?\.(gz|bz2|xz|zst))$", root.name, re.IGNORECASE)
        hint = ": unpack it, or pack it as a .tar that is not compressed" if packed else ""
        raise DataError(f"'{root}' is neither a folder of class folders nor a .tar file{hint}")
    if ignored and os.environ.get("RANK", "0") == "0":  # of a torchrun launch, one process speaks
        message(ignored_message(place, ignored))
    dataset = ImageDataset(str(place), reader=reader)
    dataset.upright = not all(re.fullmatch(r"n\d{8}", label) for label in reader.class_to_idx)
    return dataset


def _open_named(name: str, root: str, split: str, class_map: dict[str, int] | None) -> Dataset:
    """A dataset that timm knows by name; timm itself takes an unknown name for that of a folder."""
    kind, _, rest = name.partition("/")
    kind = kind.lower()
    torch_names = f"torch/NAME of {', '.join((*_TORCH_PAIRS, *_TORCH_OTHERS))}"
    if kind in _STREAMED and rest:
        raise DataError(f"'{name}' is a stream, without a length or an order: take hfds/OWNER/NAME or {torch_names}")
    if not rest or kind not in ("hfds", "torch") or (kind == "torch" and rest in ("folder", "image_folder")):
        raise DataError(
            f"there is no dataset '{name}': leave --dataset out for class folders and tars (with --variant for those "
            f"of ImageNet), or give hfds/OWNER/NAME or {torch_names}"
        )
    if kind == "torch":
        rest = rest.lower()
        if rest not in (*_TORCH_PAIRS, *_TORCH_OTHERS):
            raise DataError(f"there is no dataset '{name}': give {torch_names}")
        if class_map is not None:
            raise DataError(f"a class map is for folders, tars and hfds/ datasets, which '{name}' is not")
        known = (*split_names("train"), *split_names("validation"), *split_names("test"))
        if rest in _TORCH_PAIRS and split not in known:
            raise DataError(f"'{name}' has no split '{split}'; it has train and validation")
    elif importlib.util.find_spec("datasets") is None:
        raise DataError(f"'{name}' needs the package datasets, which is not installed: pip install datasets")
    try:
        dataset = create_dataset(name, root=root, split=split, search_split=False, class_map=class_map or "")
    except Exception as error:  # of torchvision, of datasets, of their readers: whatever they meet
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot open '{name}' in '{root}': {reason}") from error
    lacking = set(getattr(getattr(dataset, "reader", None), "_source_names", {}).values()) - set(class_map or ())
    if class_map is not None and lacking:
        raise DataError(f"the class map lacks {len(lacking)} of the classes of '{name}': {some(lacking, 5)}")
    if hasattr(dataset, "loader"):  # of torchvision's datasets of files: its own reads every format of Pillow
        dataset.loader = _load
    return dataset


def _load(path: str) -> Image.Image:
    return read_image(path, upright=False)


def class_names(dataset: Dataset) -> list[str] | None:
    """Class names by index, where the dataset knows them."""
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not mapping:
        return None
    names = {index: name for name, index in mapping.items()}
    return [names.get(i, str(i)) for i in range(max(names) + 1)]


def class_difference(here: list[str], there: list[str]) -> str:
    """In a few words how two lists of classes differ, for messages."""
    only_here, only_there = set(here) - set(there), set(there) - set(here)
    if not only_here and not only_there:
        first = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), 0)
        return f"the same in another order: class {first} is here '{here[first]}', there '{there[first]}'"
    return f"only here: {some(only_here, 3)}; only there: {some(only_there, 3)}"


@dataclass
class Batch:
    """What `GuardedDataset` yields, collated."""

    images: Tensor | None  # (n, C, H, W), None if none could be read
    targets: Tensor  # (n,)
    failures: list[tuple[str, str]]  # file name, reason
    places: list[int]  # which of the samples the images are

    def pin_memory(self) -> "Batch":
        images = None if self.images is None else self.images.pin_memory()
        return Batch(images, self.targets.pin_memory(), self.failures, self.places)


class EvaluationTransform:
    """timm's preprocessing: Pillow image -> normalized tensor.

    An image is resized by its shorter side before its middle is cut out, so one of 1 x 65535 pixels would become one of
    256 x 16776960.

    Args:
        config: From `internimage.engine.create.data_config`.
    """

    def __init__(self, config: dict) -> None:
        self.transform = create_transform(**config, is_training=False)
        crops = config.get("crop_mode") in (None, "center")
        self.shorter_side = max(config["input_size"][1:]) / (config.get("crop_pct") or 0.875) if crops else 0.0

    def __call__(self, image: Image.Image) -> Tensor:
        """Raises ImageError for an image that is too long and narrow to be resized."""
        limit, size = most_pixels(), f"{image.width} x {image.height} pixels"
        resized = self.shorter_side**2 * max(image.size) / min(image.size)
        if limit is not None and resized > max(limit, image.width * image.height):
            raise ImageError(f"{size} are too long and narrow: resized, they would become {resized:.0f}")
        try:
            return self.transform(image)
        except ValueError as error:  # as where its shorter side is to be reduced to none
            raise ImageError(f"{size} cannot be resized: {one_line(error)}") from error


class GuardedDataset(Dataset):
    """A map-style dataset whose unreadable images are reported; timm's own would put the next image in their place.

    Args:
        dataset: From `open_dataset`.
        transform: Pillow image -> tensor; may raise `ImageError`.
        upright: Turn images as their Exif data say; None does as `dataset.upright` says, and does so if it does not.
    """

    def __init__(self, dataset: Dataset, transform, upright: bool | None = None) -> None:
        if isinstance(dataset, IterableDataset):
            raise DataError("a streamed dataset has no length and no order; take one that can be indexed")
        most_pixels()  # a value of its variable that is wrong is no matter of any image
        self.dataset = dataset
        self.transform = transform
        self.upright = getattr(dataset, "upright", True) if upright is None else upright

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, tuple[str, str] | None]:
        try:
            image, target = self._read(index)
            return self.transform(image), target, None
        except ImageError as error:
            return None, -1, (self.name(index), str(error))

    def _read(self, index: int) -> tuple[Image.Image, int]:
        mode = getattr(self.dataset, "input_img_mode", "RGB")
        reader = getattr(self.dataset, "reader", None)
        try:
            sample = (self.dataset if reader is None else reader)[index]
        except ImageError:
            raise
        except Exception as error:  # of torchvision's datasets, which decode in here, and of the package datasets
            raise ImageError(why(error)) from error
        source, target = sample[:2]
        if reader is None:
            return convert_image(source, mode), int(target)
        with closing(source) if hasattr(source, "close") else nullcontext():
            return read_image(source, mode, self.upright), int(target)

    def name(self, index: int) -> str:
        """File name of a sample, or its index."""
        filename = getattr(self.dataset, "filename", None)
        try:
            name = filename(index, absolute=True) if filename else None
        except Exception:  # a reader that has to read the sample for it
            name = None
        return f"sample {index}" if name is None else str(name)

    @staticmethod
    def collate(samples: list) -> Batch:
        """For `DataLoader(collate_fn=...)`."""
        good = [(image, target) for image, target, failure in samples if failure is None]
        return Batch(
            torch.stack([image for image, _ in good]) if good else None,
            torch.tensor([target for _, target in good], dtype=torch.long),
            [failure for _, _, failure in samples if failure is not None],
            [i for i, (_, _, failure) in enumerate(samples) if failure is None],
        )
