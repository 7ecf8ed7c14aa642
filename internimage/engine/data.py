# SPDX-License-Identifier: MIT
"""Data for evaluation: timm's datasets, opened with checks and read so that a corrupt image is named, not replaced."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import UserError, some

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test",),
}


class DataError(UserError, ValueError):
    """A dataset that cannot be used as it is; the message says what is there and what should be."""


def find_split(root: str | Path, split: str) -> Path:
    """The folder of a split below `root` (`val` also finds `validation` and the like), or `root` if it has none."""
    root = Path(root)
    names = next((names for names in _SPLIT_NAMES.values() if split in names), (split,))
    for name in (split, *names):
        if (root / name).is_dir():
            return root / name
    return root


def check_image_folder(folder: Path) -> list[str]:
    """Look over a folder of class folders before anything is computed.

    Returns:
        The class names, in the order of their indices.

    Raises:
        DataError: There are no class folders, or one holds no image. An empty class would be left out in silence and
            shift the indices of all that follow.
    """
    extensions = get_img_extensions(as_set=True)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        files = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        there = f"{len(files)} files ({', '.join(files[:3])}, ...)" if files else "nothing"
        raise DataError(f"'{folder}' has no class folders: expected {folder}/CLASS/IMAGE, found {there}")
    for name in classes:
        others = []
        for _, _, files in os.walk(folder / name, followlinks=True):
            if any(Path(file).suffix.lower() in extensions for file in files):
                break
            others += files
        else:
            found = f"only {', '.join(sorted(others)[:3])}" if others else "it is empty"
            raise DataError(
                f"class folder '{folder / name}' holds no image ({found}); images end in "
                f"{', '.join(get_img_extensions())}. Add some or remove the folder"
            )
    return classes


def open_dataset(
    root: str | Path,
    split: str = "validation",
    name: str = "",
    class_map: str | None = None,
) -> Dataset:
    """A dataset through timm's `create_dataset`. It reads images as RGB; set its `input_img_mode` to "L" for grey ones.

    Args:
        root: Folder of class folders, with or without a folder for each split; a tar file; or the root that the
            dataset called `name` wants.
        split: For a folder, `train`, `validation` (`val`), `test` or any folder name; else the dataset's own word.
        name: timm's name of a dataset kind, such as `hfds/OWNER/NAME` or `torch/cifar10`; empty for folders and tars.
        class_map: File with a class name a line, in the model's order, for folders that lack some of its classes.

    Raises:
        DataError: It cannot be opened; the message says what is missing.
    """
    root, classes = Path(root), None
    if not name and root.is_dir():
        folder = find_split(root, split)
        if not any(folder.rglob("*.tar")):
            classes = check_image_folder(folder)
        root, split = folder, ""
    elif not name and not root.exists():
        raise DataError(f"there is no dataset at '{root}'")
    if class_map is not None and not Path(class_map).is_file():
        raise DataError(f"there is no class map at '{class_map}'")
    try:
        dataset = create_dataset(
            name,
            root=str(root),
            split=split or "validation",
            search_split=False,
            class_map=class_map or "",
        )
    except (RuntimeError, ValueError, AssertionError, FileNotFoundError, ImportError, OSError) as error:
        raise DataError(f"cannot open {name or 'the images'} in '{root}': {error}") from error
    odd = set(class_names(dataset) or ()) - set(classes or ()) if classes is not None and class_map is None else ()
    if odd:
        raise DataError(
            f"'{root}' has images in folders below its class folders, and these would become classes of their own "
            f"({some(odd, 3)}, beside {some(classes, 3)}): give the folder that holds the class folders, and keep the "
            f"images of a class in one folder"
        )
    return dataset


_SIGNALS = hasattr(signal, "sigwaitinfo")  # not on Windows and macOS, where workers end at any SIGTERM


@contextmanager
def sigterm_for_us() -> Iterator[None]:
    """Context in which a loader's workers are started that SIGTERM does not end, unless this process sends it.

    torchrun, systemd and `timeout` send it to a whole group of processes; without its workers a run could not end the
    step that it is in and save. To be used together with `worker_signals`.
    """
    if not _SIGNALS:
        yield
        return
    # blocked from before the fork: what a worker does about it would come too late for a quick signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_signals(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: end at the SIGTERM of the process that loads, and at no other.

    That process ends its workers with it where an exception has left them; it would wait for deaf ones forever.
    """
    if not _SIGNALS:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also where workers are not forked
    parent = multiprocessing.parent_process().pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def class_names(dataset: Dataset) -> list[str] | None:
    """Class names by index, where the dataset knows them."""
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not mapping:
        return None
    names = {index: name for name, index in mapping.items()}
    return [names.get(i, str(i)) for i in range(max(names) + 1)]


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


class GuardedDataset(Dataset):
    """A map-style dataset whose unreadable images are reported; timm's own would put the next image in their place.

    Args:
        dataset: From `open_dataset`.
        transform: Pillow image -> tensor.
    """

    def __init__(self, dataset: Dataset, transform) -> None:
        if isinstance(dataset, IterableDataset):
            raise DataError("a streamed dataset has no length and no order; take one that can be indexed")
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, tuple[str, str] | None]:
        try:
            image, target = self._read(index)
            return self.transform(image), target, None
        except Exception as error:  # Pillow's decoders raise whatever their parsing of a damaged file meets
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
            return None, -1, (self.name(index), reason)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            return self.dataset[index]
        source, target = reader[index][:2]
        with closing(source) if hasattr(source, "close") else nullcontext(), Image.open(source) as image:
            mode = self.dataset.input_img_mode
            return (image.convert(mode) if mode else image.copy()), int(target)

    def name(self, index: int) -> str:
        """File name of a sample, or its index."""
        filename = getattr(self.dataset, "filename", None)
        return str(filename(index, absolute=True)) if filename else f"sample {index}"

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
