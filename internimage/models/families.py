# SPDX-License-Identifier: MIT
"""The registry of this package's families of models: a class, and the functions that build its architectures."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import timm
import torch
from timm.models import register_model
from torch import nn

from ..weights.key_maps import KeyMap, Shape
from ..weights.load import WeightsSource, load_pretrained
from ..weights.readers import Entry

_Function = TypeVar("_Function", bound=Callable[..., nn.Module])


class FamilyModel(nn.Module):
    """Base of this package's model classes: what loading, conversion and commands need besides timm's contract."""

    key_map: ClassVar[KeyMap]

    if TYPE_CHECKING:  # not at run time, as TorchScript reads the annotations of a module
        num_classes: int
        in_chans: int
        pretrained_cfg: dict[str, Any]

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: WeightsSource, prefix: str = "", **options: Any) -> None:
        """timm's hook for weights in a format of the model's own: any format that the family's weights exist in.

        Args:
            checkpoint_path: File or folder, see `internimage.weights.load.load_pretrained`, which also takes
                the options.
            prefix: Of timm's signature; must be empty.
        """
        if prefix:
            raise ValueError(f"prefixes are found by the reader; prefix must be empty, got {prefix!r}")
        load_pretrained(self, checkpoint_path, **options)

    @torch.jit.ignore
    def materialize(self, children: set[str], device: torch.device | str) -> None:
        """Give children of a model on the meta device memory on `device` and initial values; the others stay there.

        Args:
            children: Names of direct children, such as "head".
            device: Where they go.
        """
        raise NotImplementedError

    @torch.jit.ignore
    def arguments_of(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The arguments with which a model of this architecture has weights of these shapes, under its own names."""
        in_chans = self.key_map.in_chans(shapes)
        arguments = {} if in_chans is None else {"in_chans": in_chans}
        return {**arguments, "num_classes": self.key_map.num_classes(shapes)}

    @torch.jit.ignore
    def prepare(self, found: dict[str, Entry], origin: str) -> None:
        """Replace tensors of a file by those that this model has in their place; see `load.Model`."""

    @torch.jit.ignore
    def advice(self, in_file: Mapping[str, Shape]) -> str:
        """What to do about weights that do not fit; see `load.Model`."""
        return ""


@dataclass(frozen=True, eq=False)
class Family:
    """Architectures of one model class.

    Attributes:
        name: In messages, such as "InternImage".
        model: The class.
        options: Arguments of the functions that build the models, besides those of the class.
        citation: BibTeX of the papers; empty for none.
        example: An argument in which a model may differ from its name, as on the command line.
        architectures: Names of the models, without tags.
    """

    name: str
    model: type[FamilyModel]
    options: tuple[str, ...] = ("head_from_22k", "use_ema")
    citation: str = ""
    example: str = "channels=8"
    architectures: list[str] = field(default_factory=list)

    @property
    def key_map(self) -> KeyMap:
        """The names of its models' parameters."""
        return self.model.key_map

    @property
    def arguments(self) -> tuple[str, ...]:
        """All arguments of the functions that build the models."""
        return (*inspect.signature(self.model).parameters, *self.options)

    def register(self, function: _Function) -> _Function:
        """Decorator of a function that builds a model: registers it with timm, and as one of the family."""
        register_model(function)
        self.architectures.append(function.__name__)
        return function


_families: list[Family] = []


def register_family(name: str, model: type[FamilyModel], **options: Any) -> Family:
    """Register a family; arguments as of `Family`."""
    family = Family(name, model, **options)
    _families.append(family)
    return family


def families() -> list[Family]:
    """All families, in the order of registration."""
    return list(_families)


def family_of(architecture: str) -> Family | None:
    """The family of an architecture, named with or without a tag; None if it is not of this package."""
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
