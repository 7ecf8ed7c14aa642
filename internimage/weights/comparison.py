# SPDX-License-Identifier: MIT
"""Comparing the tensors of a file with those of a model: which belong together, and what does not fit."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from timm.models._manipulate import adapt_input_conv
from torch import Tensor

from ..dtypes import problem_of
from ..errors import CheckpointError
from . import imagenet22k
from .key_maps import KeyMap, Shape
from .readers import Entry, Weights

_logger = logging.getLogger(__name__)

_OPTIONAL = "num_batches_tracked"  # counts training steps, without effect on the output


def find_model(weights: Weights, key_map: KeyMap) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of the model under its own names, and the keys of what is beside it (a detector's neck, a teacher).

    An unexpected tensor gets a name that no model has, so that it is reported as a difference.

    Raises:
        CheckpointError: There is no model of the family, or there are several.
    """
    prefixes = key_map.prefixes(weights)
    if not prefixes:
        raise CheckpointError(
            f"{weights.origin} holds no {key_map.family}: no '{key_map.anchors[0]}' in it, nor behind 'module.', "
            f"'student.', 'model.' or 'backbone.'. It has {len(weights)} tensors, beginning with "
            f"{', '.join(list(weights)[:5])}"
        )
    if len(prefixes) > 1:
        raise CheckpointError(f"{weights.origin} holds several models: under {', '.join(map(repr, sorted(prefixes)))}")
    prefix = prefixes.pop()
    own: dict[str, Entry] = {}
    beside = []
    for key, entry in weights.items():
        if key.startswith(prefix):
            name = key_map.own_name(key[len(prefix) :])
            own[f"{name} (again, as {key})" if name in own else name] = entry
        elif key_map.is_part(prefix):
            beside.append(key)
        else:
            own[f"{key} (without '{prefix}')"] = entry
    return own, beside


def shapes(tensors: Mapping[str, Entry]) -> dict[str, Shape]:
    """Their shapes; reads no values."""
    return {key: entry.shape for key, entry in tensors.items()}


@dataclass
class Comparison:
    """The tensors of a file and of a model; each step removes from both what need not fit."""

    key_map: KeyMap
    num_classes: int  # of the model
    origin: str
    found: dict[str, Entry]
    expected: dict[str, Shape]

    def take_rows(self, synsets: Sequence[str]) -> None:
        """Replace an ImageNet-22k classifier by its rows for `synsets`."""
        if self.num_classes != len(synsets):
            raise CheckpointError(
                f"a head from ImageNet-22k for {len(synsets)} synsets needs num_classes={len(synsets)}, got "
                f"{self.num_classes}"
            )
        classes = self._classes_in_file()
        if classes != imagenet22k.NUM_CLASSES:
            raise CheckpointError(
                f"{self.origin} has {classes} classes; a head from ImageNet-22k needs its {imagenet22k.NUM_CLASSES}"
            )
        rows = imagenet22k.rows(synsets)
        for key in self.key_map.classifier_keys:
            if key in self.found:
                whole = self.found[key]
                self.found[key] = Entry((len(rows), *whole.shape[1:]), whole.dtype, partial(_read_rows, whole, rows))
        _logger.info("%s: took %d of the classifier's %d rows", self.origin, len(rows), classes)

    def adapt_first_conv(self, in_chans: int, source_chans: int) -> None:
        """Replace the first convolution of `source_chans` image channels by one of `in_chans`."""
        key = self.key_map.first_conv_key
        first = self.found.get(key)
        if in_chans == source_chans or first is None or len(first.shape) != 4 or first.shape[1] != source_chans:
            return
        self.found[key] = Entry(
            (first.shape[0], in_chans, *first.shape[2:]),
            first.dtype,
            lambda: adapt_input_conv(in_chans, first.read(), base_chans=source_chans),
        )
        _logger.info("%s: adapted the first convolution from %d to %d channels", self.origin, source_chans, in_chans)

    def drop_unequal_head(self) -> None:
        """Drop tensors of the head unless both sides have them in the same shape; for models whose head is unused."""
        for key in [key for key in {**self.found, **self.expected} if self.key_map.is_head(key)]:
            if key not in self.found or self.found[key].shape != self.expected.get(key):
                self.found.pop(key, None)
                self.expected.pop(key, None)

    def fit_head(self, weights_classes: int | None) -> None:
        """Drop what the head may lack or have new, with a warning if it keeps initial values.

        Args:
            weights_classes: Classes that the weights were made for; None if unknown.

        Raises:
            CheckpointError: The file is a backbone, and the model is to classify.
        """
        if self.key_map.has_head(self.expected) and not self.key_map.has_head(self.found):
            self._keep_initial_head()
        elif self.num_classes == 0:
            self._drop_classifier()
        elif weights_classes is not None and self.num_classes != weights_classes:
            self._renew_classifier()

    def _keep_initial_head(self) -> None:
        if self.num_classes > 0:
            raise CheckpointError(
                f"{self.origin} has a backbone and no head, so it cannot classify. Load it with features_only=True or "
                f"num_classes=0; for a new classifier, call reset_classifier(N) on the latter"
            )
        head = [key for key in self.expected if self.key_map.is_head(key)]
        modules = sorted({key.split(".")[0] for key in head})
        for key in head:
            del self.expected[key]
        _logger.warning(
            "%s has no head: %s keep their initial, untrained values. forward_features and forward_intermediates do "
            "not use %s",
            self.origin, " and ".join(modules), "it" if len(modules) == 1 else "them",
        )  # fmt: skip

    def _renew_classifier(self) -> None:
        in_file = self._classes_in_file()
        if in_file == self.num_classes:
            return
        self._drop_classifier()
        for key in self.key_map.classifier_keys:
            self.expected.pop(key, None)
        reducible = in_file == imagenet22k.NUM_CLASSES and self.num_classes == 1000
        hint = "; head_from_22k=True would take ImageNet-1k's rows of it" if reducible else ""
        _logger.warning(
            "%s has %d classes and %d were asked for: the classifier is new and untrained%s",
            self.origin, in_file, self.num_classes, hint,
        )  # fmt: skip

    def _drop_classifier(self) -> None:
        for key in self.key_map.classifier_keys:
            self.found.pop(key, None)

    def _classes_in_file(self) -> int:
        return self.key_map.num_classes(shapes(self.found))

    def differences(self) -> list[str]:
        """What does not fit, one line each."""
        found, expected = self.found, self.expected
        lines = [
            f"missing: {key} {shape}"
            for key, shape in expected.items()
            if key not in found and not key.endswith(_OPTIONAL)
        ]
        lines += [
            f"shape: {key} is {found[key].shape} in the file and {shape} in the model"
            + (" (transposed)" if len(shape) == 2 and found[key].shape == shape[::-1] else "")
            for key, shape in expected.items()
            if key in found and found[key].shape != shape
        ]
        return lines + [f"unexpected: {key} {entry.shape}" for key, entry in found.items() if key not in expected]

    def hint(self, advice: str = "") -> str:
        """What to do about the most common differences; `advice` is the model's own, empty without one."""
        in_file, expected, key_map = shapes(self.found), self.expected, self.key_map
        size, wanted_size = key_map.size(in_file), key_map.size(expected)
        if size and size != wanted_size:
            return f"\nThe file is of another size: {size}; the model has {wanted_size}"
        if advice:
            return f"\n{advice}"
        unexpected = set(in_file) - set(expected)
        for pattern, advice in key_map.advice.items():
            if any(re.search(pattern, key) for key in unexpected):
                return f"\n{advice}"
        head, wanted = in_file.get(key_map.classifier_keys[0]), expected.get(key_map.classifier_keys[0])
        if head is None and wanted is not None:
            return (
                "\nThe file has no classifier: load it with num_classes=0; for a new one, then call reset_classifier(N)"
            )
        if head is not None and wanted is not None and head[1:] == wanted[1:] and head[0] != wanted[0]:
            return f"\nThe file has {head[0]} classes: create the model with num_classes={head[0]}"
        return ""


def _read_rows(entry: Entry, rows: list[int]) -> Tensor:
    return entry.read()[rows]


def problem_with(entry: Entry) -> str:
    """Why a tensor cannot be read, or is not of weights; empty if there is nothing wrong with it."""
    return entry.problem or problem_of(entry.dtype)


def check_plain(found: Mapping[str, Entry], expected: Iterable[str], origin: str) -> None:
    """CheckpointError if one of the tensors expected cannot be used."""
    for key in expected:
        problem = problem_with(found[key]) if key in found else ""
        if problem:
            raise CheckpointError(f"{origin} cannot be used, and nothing was loaded: its tensor '{key}' is {problem}")
