# SPDX-License-Identifier: MIT
"""ImageNet's usual layouts and variants, by timm's lists of classes and labels."""

import os
import pkgutil
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageDataset, ImageNetInfo, RealLabelsImagenet
from torch import nn
from torch.utils.data import Dataset

from ..errors import one_line, some
from ..progress import message
from ..values import shown
from .datasets import class_names
from .image_sets import ListedImages, open_list, read_lines
from .images import USUAL_ENDINGS, DataError, ignored_message, list_images
from .variants import VARIANTS


@dataclass
class Protocol:
    """How a variant is counted."""

    classes: list[int] | None = None  #: the model's output for each class of the dataset; None if they are the same
    names: list[str] | None = None  #: the names of these
    real: dict[str, list[int]] | None = None  #: file name -> the labels that are right


def open_labelled_folder(root: str | Path, labels: str | Path) -> Dataset:
    """A folder of images without class folders, and a file of their labels.

    Args:
        root: Folder; images may stand in folders below it.
        labels: A line an image: `FILE LABEL`, separated by white space or a comma, with or without the file's ending;
            or `LABEL` alone, in the order of the sorted file names. A label is an index from 0 in the order of the
            sorted synsets, or a synset (n01440764). More words on a line are ignored, so is a header. The lists that
            come with ImageNet on Kaggle and with Caffe are of this form.

    Raises:
        DataError: An image has no label, or two; a label is none; two images have one name; indices stand alone and
            reach from 1 to 1000, as in the development kit's list, whose numbers are not in the order of the synsets.
    """
    if str(root) == "" or str(labels) == "":
        raise DataError("the name of the images' folder or of the file of labels is empty")
    root, labels = Path(root), Path(labels)
    lines = [re.split(r"[\s,]+", line) for line in read_lines(labels, "file of labels") if line]
    if not root.is_dir():
        raise DataError(f"there is no folder of images at '{root}'")
    listing = list_images(root)
    files = sorted((root / name for name in listing.images), key=lambda file: (file.name, str(file)))
    if not files:
        raise DataError(f"'{root}' holds no image; images end in {USUAL_ENDINGS}")
    ignored = [name for name in listing.ignored if root / name != labels]
    if ignored and os.environ.get("RANK", "0") == "0":  # of a torchrun launch, one process speaks
        message(ignored_message(root, ignored))
    stems = Counter(file.stem for file in files)
    if len(stems) < len(files):
        twice = [stem for stem, count in stems.items() if count > 1]
        raise DataError(f"'{root}' has several images of one name, which labels cannot tell apart: {some(twice, 3)}")
    if lines and lines[0][0].lower() in ("imageid", "image", "file", "filename"):
        lines = lines[1:]
    synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}

    def index(label: str, where: str) -> int:
        if label in synsets:
            return synsets[label]
        if not label.isdecimal() or len(label) > 9:
            raise DataError(
                f"'{labels}' has the label {shown(label)} for {where}, which is neither an index nor a synset"
            )
        return int(label)

    if all(len(line) == 1 for line in lines):
        if len(lines) != len(files):
            raise DataError(f"'{labels}' has {len(lines)} labels, '{root}' {len(files)} images")
        targets = [index(line[0], file.name) for line, file in zip(lines, files)]
        if max(targets) == 1000:
            raise DataError(
                f"the labels of '{labels}' go up to 1000: that is the development kit's numbering, which is not the "
                f"order of the classes here. Give a file of 'FILE LABEL' lines or of synsets"
            )
        samples = list(zip(files, targets))
    else:
        known: dict[str, str] = {}
        for line in lines:
            if len(line) > 1 and known.setdefault(Path(line[0]).stem, line[1]) != line[1]:
                first, second = shown(known[Path(line[0]).stem]), shown(line[1])
                raise DataError(f"'{labels}' has two labels for {shown(line[0])}: {first} and {second}")
        missing = [file.name for file in files if file.stem not in known]
        if missing:
            raise DataError(f"'{labels}' has no label for {missing[0]} (and {len(missing) - 1} more images)")
        samples = [(file, index(known[file.stem], file.name)) for file in files]
    named = any(line[-1] in synsets or (len(line) > 1 and line[1] in synsets) for line in lines)
    dataset = ImageDataset(str(root), reader=ListedImages(root, samples, synsets if named else None))
    dataset.upright = False  # as where ImageNet's published accuracies were measured
    return dataset


def protocol(
    variant: str | None, model: nn.Module, dataset: Dataset, real_labels: str | Path | None = None
) -> Protocol:
    """How a variant is counted, once it is clear that the dataset and the model are what it takes.

    Args:
        variant: Of `VARIANTS`; None is an ordinary dataset.
        model: With ImageNet-1k's 1000 classes.
        dataset: From `open_dataset` or `open_labelled_folder`.
        real_labels: ReaL's `real.json`; None takes the copy inside timm.

    Raises:
        DataError: They are not.
    """
    if variant is None:
        return Protocol()
    if model.num_classes != 1000:
        raise DataError(
            f"--variant {variant} is for models of ImageNet-1k's 1000 classes; this one has {model.num_classes}"
        )
    names, synsets = class_names(dataset), ImageNetInfo().label_names()
    if variant in ("a", "r"):
        wanted = _lines(f"imagenet_{variant}_synsets.txt")
        _same(names, wanted, variant)
        return Protocol([int(i) for i in _lines(f"imagenet_{variant}_indices.txt")], wanted)
    if variant == "v2" and names != synsets:
        _same(names, [str(i) for i in range(1000)], variant)
        return Protocol(list(range(1000)), synsets)
    if names is not None:
        _same(names, synsets, variant)
    real = None
    if variant == "real":
        if real_labels is not None:
            open_list(real_labels, "file of ReaL labels").close()  # timm opens it again, and reads it whole
        # timm's class counts in the order of a whole run; its table alone serves any share of the images
        try:
            table = RealLabelsImagenet([""] * 50000, None if real_labels is None else str(real_labels))
            real = table.real_labels
            if not all(isinstance(some_labels, list) for some_labels in real.values()):
                raise ValueError("an image's labels are a list")
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"'{real_labels}' is not ReaL's list of 50000 labels: {one_line(error)}") from error
    return Protocol(list(range(1000)), synsets, real)


def _lines(name: str) -> list[str]:
    return pkgutil.get_data("timm.data", f"_info/{name}").decode().split()


def _same(names: list[str] | None, wanted: list[str], variant: str) -> None:
    if names != wanted:
        there = f"{len(names)} from {names[0]} to {names[-1]}" if names else "none"
        raise DataError(
            f"{VARIANTS[variant]} has {len(wanted)} class folders from {wanted[0]} to {wanted[-1]}; found {there}"
        )
