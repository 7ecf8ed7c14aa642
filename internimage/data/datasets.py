# SPDX-License-Identifier: MIT
"""Datasets of timm and torchvision, opened with checks, and read so that corrupt images are reported, not replaced."""

import importlib.util
import os
import re
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import list_some, one_line
from ..progress import message
from .image_sets import FileReader, choose_folder, open_folder, read_class_map, split_names
from .image_tars import TarReader, open_tar
from .images import DataError, ImageError, convert_image, ignored_message, pixel_limit, read_image, reason_of

T = TypeVar("T")

# timm's names; the first have two splits, and timm takes any name but `train` for the other one
_TORCH_TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_TORCH_OTHERS = ("imagenet", "inat", "inaturalist", "places365")
_STREAMED = ("hfids", "tfds", "wds")


class MapDataset(Protocol):
    """A map-style dataset: `dataset[i]` is (image, class index).

    `class_names`, `GuardedDataset` and others also look for the attributes of timm's and torchvision's datasets:
    `reader`, `class_to_idx`, `filename`, `input_img_mode`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class FolderDataset(ImageDataset):
    """timm's dataset of a folder or tar.

    Args:
        root: The folder or tar.
        reader: Of its images.
        upright: Whether the Exif orientation is applied.
    """

    def __init__(self, root: Path, reader: FileReader | TarReader, upright: bool) -> None:
        super().__init__(str(root), reader=reader)
        self.upright = upright


def open_dataset(
    root: str | Path,
    split: str = "validation",
    name: str = "",
    class_map: str | Path | None = None,
) -> MapDataset:
    """Open a map-style dataset of timm or torchvision and check it.

    Images are read as RGB; `read_as_gray` changes that. Their Exif orientation is applied, unless all classes are
    synsets of ImageNet, whose published accuracies were measured without. Files that are ignored are reported on
    stderr.

    Args:
        root: Folder of class folders, with or without a folder for each split; a tar of these; or the root folder of
            the dataset called `name`.
        split: For a folder or tar, `train`, `validation` (`val`), `test` or any folder name; otherwise a split of the
            named dataset.
        name: timm's name of a dataset, `hfds/OWNER/NAME` or `torch/NAME`; empty for folders and tars.
        class_map: File with one class name per line, in the model's order, for folders that lack some of its classes.

    Raises:
        DataError: It cannot be opened; the message says what is missing.
    """
    if str(root) == "":
        raise DataError("the name of the data folder is empty")
    mapping = None if class_map is None else read_class_map(class_map)
    if name:
        return _open_named(name, str(root), split or "validation", mapping)
    root = Path(root)
    reader: FileReader | TarReader
    if root.is_dir():
        where = choose_folder(root, split)
        reader, ignored = open_folder(where, mapping)
    elif not root.exists():
        raise DataError(f"there is no dataset at '{root}'")
    elif root.is_file() and root.suffix.lower() == ".tar":
        where = root
        reader, ignored = open_tar(root, split, mapping)
    else:
        archive = re.search(r"\.(tgz|tbz2?|txz|zip|rar|7z|(tar)?\.(gz|bz2|xz|zst))$", root.name, re.IGNORECASE)
        hint = ": unpack it, or convert it to an uncompressed .tar" if archive else ""
        raise DataError(f"'{root}' is neither a folder of class folders nor a .tar file{hint}")
    report_ignored(where, ignored)
    return FolderDataset(
        where, reader, upright=not all(re.fullmatch(r"n\d{8}", label) for label in reader.class_to_idx or ())
    )


def report_ignored(where: Path, ignored: list[str]) -> None:
    """Print a line on stderr about ignored files, in the first process of a torchrun launch."""
    if ignored and os.environ.get("RANK", "0") == "0":
        message(ignored_message(where, ignored))


def read_as_gray(dataset: MapDataset) -> None:
    """Make a dataset read its images with one channel instead of RGB."""
    # timm's attribute; `GuardedDataset` reads it from every dataset
    dataset.input_img_mode = "L"  # type: ignore[attr-defined]  # torchvision's datasets do not declare it


def _open_named(name: str, root: str, split: str, class_map: dict[str, int] | None) -> MapDataset:
    """A dataset that timm knows by name; timm itself would take an unknown name for a folder."""
    kind, _, rest = name.partition("/")
    kind = kind.lower()
    torch_names = f"torch/NAME of {', '.join((*_TORCH_TWO_SPLITS, *_TORCH_OTHERS))}"
    if kind in _STREAMED and rest:
        raise DataError(
            f"'{name}' is streamed and has no length or order: use hfds/OWNER/NAME or {torch_names} instead"
        )
    if not rest or kind not in ("hfds", "torch") or (kind == "torch" and rest in ("folder", "image_folder")):
        raise DataError(
            f"there is no dataset '{name}': omit --dataset for class folders and tars (with --variant for those of "
            f"ImageNet), or give hfds/OWNER/NAME or {torch_names}"
        )
    if kind == "torch":
        rest = rest.lower()
        if rest not in (*_TORCH_TWO_SPLITS, *_TORCH_OTHERS):
            raise DataError(f"there is no dataset '{name}': give {torch_names}")
        if class_map is not None:
            raise DataError(f"a class map is for folders, tars and hfds/ datasets, which '{name}' is not")
        known = (*split_names("train"), *split_names("validation"), *split_names("test"))
        if rest in _TORCH_TWO_SPLITS and split not in known:
            raise DataError(f"'{name}' has no split '{split}'; it has train and validation")
    elif importlib.util.find_spec("datasets") is None:
        raise DataError(f"'{name}' needs the package datasets, which is not installed: pip install datasets")
    try:
        dataset = create_dataset(name, root=root, split=split, search_split=False, class_map=class_map or {})
    except Exception as error:  # any that torchvision, datasets or their readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot open '{name}' in '{root}': {reason}") from error
    lacking = set(getattr(getattr(dataset, "reader", None), "_source_names", {}).values()) - set(class_map or ())
    if class_map is not None and lacking:
        raise DataError(f"the class map lacks {len(lacking)} of the classes of '{name}': {list_some(lacking, 5)}")
    if hasattr(dataset, "loader"):  # of torchvision's datasets of files, whose own opens every format of Pillow
        dataset.loader = _load
    return dataset


def _load(path: str) -> Image.Image:
    return read_image(path, upright=False)


def class_names(dataset: MapDataset) -> list[str] | None:
    """Class names by index; None if the dataset has none."""
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not mapping:
        return None
    names = {index: name for name, index in mapping.items()}
    return [names.get(i, str(i)) for i in range(max(names) + 1)]


def class_difference(here: list[str], there: list[str]) -> str:
    """In a few words, how two lists of classes differ, for messages."""
    only_here, only_there = set(here) - set(there), set(there) - set(here)
    if not only_here and not only_there:
        first = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), 0)
        return f"the same in another order: class {first} is '{here[first]}' here, '{there[first]}' there"
    return f"only here: {list_some(only_here, 3)}; only there: {list_some(only_there, 3)}"


@dataclass
class Batch:
    """Samples of a `GuardedDataset`, collated."""

    images: Tensor | None  # (n, C, H, W); None if no image could be read
    targets: Tensor  # (n,)
    failures: list[tuple[str, str]]  # file name, reason
    positions: list[int]  # of the n images among all samples of the batch

    @property
    def size(self) -> int:
        """The number of samples, unreadable ones included."""
        return len(self.positions) + len(self.failures)

    def pin_memory(self) -> "Batch":
        """For `DataLoader(pin_memory=True)`."""
        images = None if self.images is None else self.images.pin_memory()
        return Batch(images, self.targets.pin_memory(), self.failures, self.positions)


class EvaluationTransform:
    """timm's preprocessing: Pillow image -> normalized tensor.

    timm resizes an image by its shorter side before it crops the center, so that an image of 1 x 65535 pixels would
    become one of 256 x 16776960. Such images are rejected.

    Args:
        config: From `internimage.engine.create.data_config`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.transform = create_transform(**config, is_training=False)
        crops = config.get("crop_mode") in (None, "center")
        self.shorter_side = max(config["input_size"][1:]) / (config.get("crop_pct") or 0.875) if crops else 0.0

    def __call__(self, image: Image.Image) -> Tensor:
        """Raises ImageError for an image that is too long and narrow to be resized."""
        limit, size = pixel_limit(), f"{image.width} x {image.height} pixels"
        resized = self.shorter_side**2 * max(image.size) / min(image.size)
        if limit is not None and resized > max(limit, image.width * image.height):
            raise ImageError(f"{size} are too long and narrow: resized, they would become {resized:.0f}")
        try:
            return self.transform(image)
        except ValueError as error:  # for example if the shorter side would be resized to 0
            raise ImageError(f"{size} cannot be resized: {one_line(error)}") from error


class GuardedDataset(Dataset[tuple[T | None, int, tuple[str, str] | None]], Generic[T]):
    """A map-style dataset that reports unreadable images; timm's own would use the next image instead.

    `dataset[i]` is (transformed image, class index, None), or (None, -1, (file name, reason)).

    Args:
        dataset: From `open_dataset`.
        transform: Function of a Pillow image; may raise `ImageError`.
        upright: Apply the Exif orientation; None takes `dataset.upright`, or True if there is no such attribute.
    """

    def __init__(self, dataset: MapDataset, transform: Callable[[Image.Image], T], upright: bool | None = None) -> None:
        if isinstance(dataset, IterableDataset):
            raise DataError("a streamed dataset has no length and no order; use one that can be indexed")
        pixel_limit()  # an invalid value of its environment variable must not count as an unreadable image
        self.dataset = dataset
        self.transform = transform
        self.upright: bool = getattr(dataset, "upright", True) if upright is None else upright

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[T | None, int, tuple[str, str] | None]:
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
        except Exception as error:  # any of torchvision's datasets, which decode here, or of the package datasets
            raise ImageError(reason_of(error)) from error
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
        except Exception:  # of a reader that has to read the sample to find its name
            name = None
        return f"sample {index}" if name is None else str(name)


def collate(samples: list[tuple[Tensor | None, int, tuple[str, str] | None]]) -> Batch:
    """Collate samples of a `GuardedDataset`, for `DataLoader(collate_fn=...)`."""
    images = [image for image, _, _ in samples if image is not None]
    return Batch(
        torch.stack(images) if images else None,
        torch.tensor([target for image, target, _ in samples if image is not None], dtype=torch.long),
        [failure for _, _, failure in samples if failure is not None],
        [i for i, (image, _, _) in enumerate(samples) if image is not None],
    )
