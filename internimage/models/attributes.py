# SPDX-License-Identifier: MIT
"""What timm sets on every model, with its types; `nn.Module` declares none of it."""

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
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


def label_names(model: nn.Module) -> list[str]:
    """Readable names of the classes: those saved with the weights, ImageNet's, or the indices."""
    cfg, count = pretrained_cfg(model), num_classes(model)
    names, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if isinstance(names, dict):  # index -> name, as timm takes it where some classes have none
        names = [names.get(i, names.get(str(i), str(i))) for i in range(count)]
    if names and len(names) == count:
        return [descriptions.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(count)]
    return [str(i) for i in range(count)]
