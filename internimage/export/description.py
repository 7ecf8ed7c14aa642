# SPDX-License-Identifier: MIT
"""What an exported file says of itself: the model, its preprocessing and classes, and how it was verified."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from .. import __version__
from ..errors import UserError, one_line
from ..models.attributes import label_names, pretrained_cfg

PREFIX = "internimage."  # of the keys in a file's metadata
OPEN = ("batch", "height", "width")


def cause_of(error: BaseException) -> str:
    """The first cause of an error, in one line, without the colors and advice of the exporters around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(Exception(re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__))


class ExportError(UserError, ValueError):
    """A model that cannot be exported as asked, or an exported file that cannot be used."""


class VerificationError(ExportError):
    """An exported file that does not compute what the model does. It was removed."""

    status = 1  # the arguments were good


@dataclass(frozen=True)
class Description:
    """Everything that a reader of an exported file needs to know.

    Attributes:
        format: "onnx", "pt2" or "aoti".
        architecture: timm's name.
        weights: Tag, repository or file that they are from.
        checksum: SHA-256 of the weights: of names, shapes, dtypes and bytes, in the order of names.
        license: Of the weights; empty if it is not known.
        classes: Names; empty for features.
        input_size: (channels, height, width) that the model was made for.
        mean: Of the normalization, for values from 0 to 1.
        std: Of the normalization.
        interpolation: Of the resizing.
        crop_pct: Share of the resized image that is kept.
        crop_mode: timm's.
        operator: "deform-conv", "grid-sample", "internimage" (our own operator) or "decomposed"; empty for a model
            without deformable layers.
        dtype: Of the weights.
        quantization: "dynamic", "static" or empty.
        opset: Of ONNX; 0 for other formats.
        features: Names of the maps, such as "stride8"; empty for logits.
        open: Which of the input's dimensions take any length: all of "batch", "height" and "width", the batch alone,
            or none.
        preprocessed: Whether the file resizes, crops and normalizes images by itself.
        device: That an AOTI package was built for; empty otherwise.
        versions: Of the packages that made the file.
        verification: What was compared, and the verdict; empty if the file was not verified.
    """

    format: str
    architecture: str
    weights: str
    checksum: str
    license: str
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    operator: str
    dtype: str = "float32"
    quantization: str = ""
    opset: int = 0
    features: tuple[str, ...] = ()
    open: tuple[str, ...] = OPEN
    preprocessed: bool = False
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    verification: Mapping[str, Any] = field(default_factory=dict)

    def properties(self) -> dict[str, str]:
        """Texts for a file's metadata: a text as it is, anything else as JSON."""
        values = dataclasses.asdict(self)
        return {
            PREFIX + name: value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            for name, value in values.items()
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], file: str) -> "Description":
        """The description in a file's metadata.

        Raises:
            ExportError: It is not there, or damaged.
        """
        found = {key.removeprefix(PREFIX): text for key, text in properties.items() if key.startswith(PREFIX)}
        if not found:
            raise ExportError(f"'{file}' says nothing of its model: it was not written by internimage export")
        try:
            values: dict[str, Any] = {
                each.name: found[each.name] if each.type in (str, "str") else json.loads(found[each.name])
                for each in dataclasses.fields(cls)
                if each.name in found
            }
            lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(**(values | lists))
        except (ValueError, TypeError, RecursionError) as error:
            raise ExportError(f"what '{file}' says of its model is damaged: {error}") from error

    def data_config(self) -> dict[str, Any]:
        """timm's preprocessing."""
        return {
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


def describe(model: nn.Module, config: Mapping[str, Any], weights: str, **more: Any) -> Description:
    """The description of a model that is about to be exported.

    Args:
        model: With timm's `pretrained_cfg`.
        config: timm's preprocessing.
        weights: Where they are from, in words.
        more: Other attributes.
    """
    cfg = pretrained_cfg(model)
    classes: Any = getattr(model, "num_classes", 0)
    return Description(
        architecture=str(cfg.get("architecture") or type(model).__name__),
        weights=weights,
        checksum=checksum(model),
        license=str(cfg.get("license") or ""),
        classes=tuple(label_names(model)) if classes and not more.get("features") else (),
        input_size=tuple(config["input_size"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config.get("crop_mode") or "center"),
        versions={"internimage": __version__, "torch": torch.__version__, "timm": timm.__version__},
        **more,
    )


def checksum(model: nn.Module) -> str:
    """SHA-256 of a model's weights, whatever file they came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
