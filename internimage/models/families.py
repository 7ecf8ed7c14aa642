# SPDX-License-Identifier: MIT
"""The families of models of this package: each registers its class, and the functions that build its architectures."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import timm
from timm.models import register_model
from torch import nn

from ..weights.key_maps import KeyMap

_Function = TypeVar("_Function", bound=Callable[..., nn.Module])


@dataclass(frozen=True, eq=False)
class Family:
    """Architectures of one model class.

    Attributes:
        name: In messages, such as "InternImage".
        model: The class. It names its parameters by a `key_map`.
        options: What the functions that build the models take beside the arguments of the class.
        architectures: Names of the models, without tags.
    """

    name: str
    model: type[nn.Module]
    options: tuple[str, ...] = ("head_from_22k", "use_ema")
    architectures: list[str] = field(default_factory=list)

    @property
    def key_map(self) -> KeyMap:
        """The names of its models' parameters."""
        key_map: KeyMap = self.model.key_map  # type: ignore[assignment]  # mypy takes it for a submodule
        return key_map

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the functions that build the models take."""
        return (*inspect.signature(self.model).parameters, *self.options)

    def register(self, function: _Function) -> _Function:
        """Decorator of a function that builds a model: registers it with timm, and as one of the family."""
        register_model(function)
        self.architectures.append(function.__name__)
        return function


_families: list[Family] = []


def register_family(name: str, model: type[nn.Module], **options: Any) -> Family:
    """A new family; for the arguments see there."""
    family = Family(name, model, **options)
    _families.append(family)
    return family


def families() -> list[Family]:
    """All families, in the order of registration."""
    return list(_families)


def family_of(architecture: str) -> Family | None:
    """The family of one of this package's models, by its name with or without a tag; None for another model."""
    name = architecture.partition(".")[0]
    return next((family for family in _families if name in family.architectures), None)


def is_ours(architecture: str) -> bool:
    """Whether a model of timm's registry is one of this package."""
    return family_of(architecture) is not None


def list_models(pretrained: bool = False) -> list[str]:
    """Names of this package's models for `timm.create_model`: the released weights as `name.tag`, or architectures."""
    return [name for name in timm.list_models(pretrained=pretrained) if is_ours(name)]


def known_models() -> list[str]:
    """Names of this package's models, with and without tags."""
    return [name for name in timm.list_models(include_tags=True) if is_ours(name)] + list_models()
