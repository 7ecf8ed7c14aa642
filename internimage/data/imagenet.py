# SPDX-License-Identifier: MIT
"""ImageNet's usual layouts and variants, by timm's lists of classes and labels."""

import pkgutil
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn

from ..errors import list_some, one_line
from ..models.attributes import num_classes
from ..values import shown
from .datasets import FolderDataset, MapDataset, class_names, report_ignored
from .image_sets import FileReader, open_list, read_lines
from .images import COMMON_EXTENSIONS, DataError, list_images
from .variants import VARIANTS

_HEADERS = ("imageid", "image", "file", "filename")  # first words of a header line


# ---- images without class folders


def open_labelled_folder(root: str | Path, labels: str | Path) -> FolderDataset:
    """Open a folder of images without class folders, with a file of their labels.

    Args:
        root: Folder; images may be in folders below it.
        labels: One line per image: `FILE LABEL`, separated by white space or a comma, with or without the file's
            extension; or only `LABEL`, in the order of the sorted file names. A label is an index from 0 in the order
            of the sorted synsets, or a synset (n01440764). Further words on a line are ignored, and so is a header. The
            lists that come with ImageNet on Kaggle and with Caffe have this form.

    Raises:
        DataError: An image has no label, or two; a label is invalid; two images have the same name; labels without file
            names are indices from 1 to 1000, as in the development kit, which are not in the order of the synsets.
    """
    if str(root) == "" or str(labels) == "":
        raise DataError("the name of the image folder or of the file of labels is empty")
    root, labels = Path(root), Path(labels)
    rows = _read_rows(labels)
    files = _list_flat(root, labels)
    in_order = all(len(row) == 1 for row in rows)
    if in_order:
        texts = _labels_in_order(rows, labels, files, root)
    else:
        texts = _labels_by_name(rows, labels, files)
    synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
    targets = [_parse_label(text, synsets, labels, file) for text, file in zip(texts, files)]
    if in_order and max(targets) == 1000:
        raise DataError(
            f"the labels of '{labels}' go up to 1000: that is the numbering of the development kit, which is not the "
            f"order of the classes here. Give a file of 'FILE LABEL' lines or of synsets"
        )
    has_synsets = any(row[-1] in synsets or (len(row) > 1 and row[1] in synsets) for row in rows)
    samples = [(str(file), target) for file, target in zip(files, targets)]
    # upright=False: ImageNet's published accuracies were measured without Exif orientation
    return FolderDataset(root, FileReader(root, samples, synsets if has_synsets else None), upright=False)


def _read_rows(labels: Path) -> list[list[str]]:
    """The words of each line of a file of labels, without a header and empty lines."""
    rows = [re.split(r"[\s,]+", line) for line in read_lines(labels, "file of labels") if line]
    return rows[1:] if rows and rows[0][0].lower() in _HEADERS else rows


def _list_flat(root: Path, labels: Path) -> list[Path]:
    """The images below a folder, sorted by name; names without the extension are unique."""
    if not root.is_dir():
        raise DataError(f"there is no image folder at '{root}'")
    listing = list_images(root)
    files = sorted((root / name for name in listing.images), key=lambda file: (file.name, str(file)))
    if not files:
        raise DataError(f"'{root}' contains no image; image files end in {COMMON_EXTENSIONS}")
    report_ignored(root, [name for name in listing.ignored if root / name != labels])
    duplicates = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
    if duplicates:
        raise DataError(
            f"'{root}' has several images of the same name, which labels cannot tell apart: {list_some(duplicates, 3)}"
        )
    return files


def _labels_in_order(rows: list[list[str]], labels: Path, files: list[Path], root: Path) -> list[str]:
    """The label of each file, of lines without file names."""
    if len(rows) != len(files):
        raise DataError(f"'{labels}' has {len(rows)} labels, '{root}' {len(files)} images")
    return [row[0] for row in rows]


def _labels_by_name(rows: list[list[str]], labels: Path, files: list[Path]) -> list[str]:
    """The label of each file, of lines with file names."""
    by_stem: dict[str, str] = {}
    for row in rows:
        if len(row) > 1 and by_stem.setdefault(Path(row[0]).stem, row[1]) != row[1]:
            first, second = shown(by_stem[Path(row[0]).stem]), shown(row[1])
            raise DataError(f"'{labels}' has two labels for {shown(row[0])}: {first} and {second}")
    missing = [file.name for file in files if file.stem not in by_stem]
    if missing:
        raise DataError(f"'{labels}' has no label for {missing[0]} (and {len(missing) - 1} more images)")
    return [by_stem[file.stem] for file in files]


def _parse_label(text: str, synsets: dict[str, int], labels: Path, file: Path) -> int:
    """The class index of a label, an index or a synset."""
    if text in synsets:
        return synsets[text]
    if not text.isdecimal() or len(text) > 9:
        raise DataError(
            f"'{labels}' has the label {shown(text)} for {file.name}, which is neither an index nor a synset"
        )
    return int(text)


# ---- variants


@dataclass
class EvaluationProtocol:
    """How accuracy on a variant is computed; by default, as on an ordinary dataset."""

    classes: list[int] | None = None  #: the model's output for each class of the dataset; None if they are the same
    names: list[str] = field(default_factory=list)  #: of `classes`
    real: dict[str, list[int]] | None = None  #: file name -> the labels that count as correct


def protocol(
    variant: str | None, model: nn.Module, dataset: MapDataset, real_labels: str | Path | None = None
) -> EvaluationProtocol:
    """How accuracy on a variant is computed, after checks that the dataset and the model fit it.

    Args:
        variant: One of `VARIANTS`; None for an ordinary dataset.
        model: With ImageNet-1k's 1000 classes.
        dataset: From `open_dataset` or `open_labelled_folder`.
        real_labels: ReaL's `real.json`; None takes the copy in timm.

    Raises:
        DataError: They do not fit.
    """
    if variant is None:
        return EvaluationProtocol()
    count = num_classes(model)
    if count != 1000:
        raise DataError(f"--variant {variant} is for models with ImageNet-1k's 1000 classes; this one has {count}")
    names, synsets = class_names(dataset), ImageNetInfo().label_names()
    if variant in ("a", "r"):
        expected = _read_info(f"imagenet_{variant}_synsets.txt")
        _check_names(names, expected, variant)
        return EvaluationProtocol([int(i) for i in _read_info(f"imagenet_{variant}_indices.txt")], expected)
    if variant == "v2" and names != synsets:
        _check_names(names, [str(i) for i in range(1000)], variant)
        return EvaluationProtocol(list(range(1000)), synsets)
    if names is not None:
        _check_names(names, synsets, variant)
    return EvaluationProtocol(list(range(1000)), synsets, _read_real(real_labels) if variant == "real" else None)


def _read_real(path: str | Path | None) -> dict[str, list[int]]:
    """ReaL's labels by file name."""
    if path is not None:
        open_list(path, "file of ReaL labels").close()  # checks it; timm opens it again and reads it whole
    # timm's class computes accuracy over a complete run in order; its table also serves part of the images
    try:
        table = RealLabelsImagenet([""] * 50000, None if path is None else str(path)).real_labels
        if not all(isinstance(labels, list) for labels in table.values()):
            raise ValueError("the labels of an image must be a list")
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not ReaL's list of 50000 labels: {one_line(error)}") from error
    return table


def _read_info(name: str) -> list[str]:
    """The lines of a list in timm."""
    data = pkgutil.get_data("timm.data", f"_info/{name}")
    if data is None:
        raise FileNotFoundError(f"timm has no list {name}")
    return data.decode().split()


def _check_names(names: list[str] | None, expected: list[str], variant: str) -> None:
    if names != expected:
        found = f"{len(names)} from {names[0]} to {names[-1]}" if names else "none"
        raise DataError(
            f"--variant {variant} ({VARIANTS[variant]}) needs {len(expected)} class folders from {expected[0]} to "
            f"{expected[-1]}; found {found}"
        )
