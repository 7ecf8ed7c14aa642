# SPDX-License-Identifier: MIT
"""Nodes: the numbers inside a model that a view explains.

A node is a vector, or a single number: a position of a layer's map or one channel of it, the logit of a class, the
pooled feature.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.attributes import label_names, name_of
from .inspection import inspected
from .maps import LayerMap, MapReader, NodeError, whole_number

__all__ = ["Logit", "Node", "OpenNode", "Pooled", "Position", "map_of", "predicted_class"]


class OpenNode(Protocol):
    """A node of a certain model."""

    is_vector: bool
    """Whether it has several numbers, of which only the direction counts in `saliency_region`."""

    def values(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> (N, D), differentiable; D = 1 for a single number.

        Raises:
            NodeError: The node is not there, which the first images show.
        """

    def text(self) -> str:
        """What the node is, in words; after `values`."""

    def layer_map(self) -> LayerMap | None:
        """The map that the node is a position of, after `values`; None for a node without one."""

    def center(self) -> tuple[float, float] | None:
        """The image pixel (x, y) that the node is at, after `values`; None for a node of the whole image."""


class Node(Protocol):
    """What a view is of."""

    def open(self, model: nn.Module) -> OpenNode:
        """The node in a model.

        Raises:
            NodeError: The model has no such node.
        """


@dataclass(frozen=True)
class Position:
    """A position of a layer's map: its vector of channels, or one of them.

    Attributes:
        layer: Name of a module, such as "levels.2.blocks.0"; a stage, from 1; or None, the last stage.
        x: Column, from 0; None for the middle one.
        y: Row, from 0; None for the middle one.
        channel: From 0; None for all, as a vector.
    """

    layer: str | int | None = None
    x: int | None = None
    y: int | None = None
    channel: int | None = None

    def open(self, model: nn.Module) -> OpenNode:
        """See `Node`."""
        return _OpenPosition(model, self)


@dataclass(frozen=True)
class Logit:
    """The logit of a class.

    Attributes:
        label: Name or index of the class; None for the one that the model predicts.
    """

    label: str | int | None = None

    def open(self, model: nn.Module) -> OpenNode:
        """See `Node`."""
        return _OpenLogit(model, self.label)


@dataclass(frozen=True)
class Pooled:
    """The pooled feature: the vector that the classifier gets (timm's `forward_head` with `pre_logits`)."""

    def open(self, model: nn.Module) -> OpenNode:
        """See `Node`."""
        return _OpenPooled(model)


class _OpenPosition:
    def __init__(self, model: nn.Module, position: Position) -> None:
        self.reader = MapReader(model, position.layer)
        self.x, self.y = _index(position.x, "x"), _index(position.y, "y")
        self.channel = _index(position.channel, "channel")
        self.is_vector = self.channel is None
        self.map: LayerMap | None = None

    def values(self, images: Tensor) -> Tensor:
        maps = self.reader(images)
        self.map = self.reader.size(maps, images)
        x = self.map.width // 2 if self.x is None else self.x
        y = self.map.height // 2 if self.y is None else self.y
        if x >= self.map.width or y >= self.map.height:
            raise NodeError(
                f"the map of '{self.map.layer}' has columns x 0 to {self.map.width - 1} and rows y 0 to "
                f"{self.map.height - 1} for this image, got ({x}, {y})"
            )
        self.x, self.y = x, y
        if self.channel is None:
            return maps[:, y, x]
        if self.channel >= self.map.channels:
            raise NodeError(
                f"the map of '{self.map.layer}' has channels 0 to {self.map.channels - 1}, got {self.channel}"
            )
        return maps[:, y, x, self.channel, None]

    def text(self) -> str:
        part = "" if self.channel is None else f", channel {self.channel}"
        return f"{self.reader.name} at column {self.x}, row {self.y}{part}"

    def layer_map(self) -> LayerMap | None:
        return self.map

    def center(self) -> tuple[float, float] | None:
        if self.map is None or self.x is None or self.y is None:
            return None
        return self.map.to_image(self.x, self.y)


class _OpenLogit:
    is_vector = False

    def __init__(self, model: nn.Module, label: str | int | None) -> None:
        self.model, self.names = model, _names(model)
        self.index = None if label is None else _class(name_of(model), self.names, label)

    def values(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise NodeError(f"'{name_of(self.model)}' gives no logits (N, classes), but {shape}: it has no class nodes")
        if self.index is None:
            self.index = int(logits[0].argmax())
        if self.index >= logits.shape[1]:  # of a model that does not say how many classes it has
            raise NodeError(f"'{name_of(self.model)}' has classes 0 to {logits.shape[1] - 1}, got {self.index}")
        return logits[:, self.index, None]

    def text(self) -> str:
        name = self.names[self.index] if self.names and self.index is not None else str(self.index)
        return f"logit of class {self.index}" + ("" if name == str(self.index) else f" ({name})")

    def layer_map(self) -> LayerMap | None:
        return None

    def center(self) -> tuple[float, float] | None:
        return None


class _OpenPooled:
    is_vector = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        if not callable(getattr(model, "forward_features", None)) or not callable(getattr(model, "forward_head", None)):
            raise NodeError(f"'{name_of(model)}' has no pooled feature (timm's forward_features and forward_head)")

    def values(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        if pooled.dim() != 2:
            raise NodeError(f"'{name_of(self.model)}' does not pool: its features are {tuple(pooled.shape)}")
        return pooled

    def text(self) -> str:
        return "pooled feature"

    def layer_map(self) -> LayerMap | None:
        return None

    def center(self) -> tuple[float, float] | None:
        return None


def _index(value: int | None, name: str) -> int | None:
    """A number from 0, or None."""
    return None if value is None else whole_number(name, value, 0)


def _names(model: nn.Module) -> list[str] | None:
    """The names of a model's classes; None if it does not say how many it has."""
    count: Any = getattr(model, "num_classes", None)
    if not isinstance(count, int):
        return None
    if count == 0:
        raise NodeError(f"'{name_of(model)}' has no classes")
    return label_names(model)


def _class(model: str, names: list[str] | None, label: str | int) -> int:
    """The index of a class by its name, or the first of its names, in any case; or by its index."""
    if not isinstance(label, str):
        number = whole_number("the index of a class", label, 0)
        if names is not None and number >= len(names):
            raise NodeError(f"'{model}' has classes 0 to {len(names) - 1}, got {number}")
        return number
    known: dict[str, int] = {}
    for i, name in enumerate(names or ()):
        for spelling in (name, name.split(",")[0]):
            known.setdefault(spelling.lower(), i)
    wanted = label.strip().lower()
    if wanted in known:
        return known[wanted]
    if wanted.isdecimal():
        return _class(model, names, int(wanted))
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or list(known)[:3]
    shown = ", ".join(names[known[name]] for name in near) if names else "indices"
    raise NodeError(f"'{model}' has no class '{label}'; near ones are {shown}")


def predicted_class(model: nn.Module, image: Tensor) -> int:
    """The index of the class that a model predicts for an image (C, H, W) or (1, C, H, W).

    Raises:
        NodeError: The model gives no logits.
        NotFiniteView: There is NaN or infinity in the weights or in the image.
    """
    opened = _OpenLogit(model, None)
    with inspected(model, image) as batch, torch.no_grad():
        opened.values(batch)
    assert opened.index is not None
    return opened.index


def map_of(model: nn.Module, image: Tensor, layer: str | int | None = None) -> LayerMap:
    """The size of a layer's map for an image, such as to find the position that covers a pixel.

    Args:
        model: Any model.
        image: (C, H, W) or (1, C, H, W), preprocessed.
        layer: As for `Position`.

    Raises:
        NodeError: The model has no such layer.
        NotFiniteView: There is NaN or infinity in the weights or in the image.
    """
    reader = MapReader(model, layer)
    with inspected(model, image) as batch, torch.no_grad():
        return reader.size(reader(batch), batch)
