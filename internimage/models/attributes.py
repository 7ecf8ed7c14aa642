# SPDX-License-Identifier: MIT
"""What timm sets on every model, with its types; `nn.Module` declares none of it."""

from typing import Any

from torch import nn


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """What the model's weights were made for; empty for a model that timm has not built."""
    cfg: dict[str, Any] | None = getattr(model, "pretrained_cfg", None)
    return {} if cfg is None else cfg


def num_classes(model: nn.Module) -> int:
    """The classes of its classifier."""
    count: Any = model.num_classes
    return int(count)


def classifier_of(model: nn.Module) -> nn.Module:
    """The module of its classifier."""
    classifier: Any = model.get_classifier()  # type: ignore[operator]  # a method of timm's models
    return classifier


def name_of(model: nn.Module) -> str:
    """The model's name for messages: timm's, or that of its class."""
    return str(pretrained_cfg(model).get("architecture") or type(model).__name__)
