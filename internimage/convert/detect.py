# SPDX-License-Identifier: MIT
"""Detecting the model that weights belong to."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import timm

from ..errors import CheckpointError, UserError, one_line
from ..models.families import Family, FamilyModel, families, family_of
from ..models.model_config import NOT_OF_A_MODEL, ModelConfig, ModelConfigError, find_model_config
from ..weights.imagenet22k import imagenet_1k
from ..weights.key_maps import Shape
from ..weights.load import shapes_of
from ..weights.readers import Weights
from ..weights.released import PUBLISHED
from ..weights.resolve import Source

_logger = logging.getLogger(__name__)


class ConvertError(UserError, RuntimeError):
    """Weights that cannot be converted, or a folder that cannot be written. Nothing was left behind."""


def model_of(
    source: Source, weights: Weights, name: str | None, model_kwargs: dict[str, Any], reduce_head: bool
) -> tuple[FamilyModel, bool]:
    """The model that weights belong to, on the meta device, and whether the weights lack a head.

    Args:
        source: Where the weights are.
        weights: The same, opened.
        name: timm's name of the model; detected if None.
        model_kwargs: Arguments of the model where it differs from that name.
        reduce_head: The model gets ImageNet-1k's classes.

    Raises:
        ConvertError: It has no released size and no name was given, or it cannot be built.
        CheckpointError: The weights hold no model of this package.
    """
    unknown = [key for key in model_kwargs if key in NOT_OF_A_MODEL]
    if unknown:
        raise ConvertError(f"'{unknown[0]}' is no argument of a model")
    family, shapes = _family_of(weights)
    kwargs: dict[str, Any] = {"device": "meta", **model_kwargs}
    described = _described(source.path) if name is None and source.model is None else None
    if described is not None:
        folder, config = described
        name, architecture = f"local-dir:{folder}", config.architecture
    else:
        name = architecture = name or source.model or _guess(family, shapes, source.path)
    if timm.is_model(architecture) and family_of(architecture) is None:
        ours = " and ".join(one.name for one in families())
        raise ConvertError(f"'{name}' is of the architecture '{architecture}'; only {ours} can be converted")
    try:
        if described is None:
            kwargs = {**_build(name, family, device="meta").arguments_of(shapes), **kwargs}
        if reduce_head:
            kwargs["num_classes"] = len(imagenet_1k())
        model = _build(name, family, **kwargs)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        given = {key: value for key, value in kwargs.items() if key != "device"}
        raise ConvertError(f"cannot build '{name}' with {given}: {one_line(error)}") from error
    return model, not family.key_map.has_head(shapes)


def _family_of(weights: Weights) -> tuple[Family, dict[str, Shape]]:
    """The family of weights, and the shapes of their tensors under its names."""
    known = families()
    possible = [family for family in known if family.key_map.prefixes(weights)]
    for family in [family for family in possible if family.key_map.is_in(weights)] or possible:
        return family, shapes_of(weights, family.key_map)
    if len(known) == 1:
        shapes_of(weights, known[0].key_map)  # raises, and says what was looked for
    names = " and no ".join(family.name for family in known)
    raise CheckpointError(f"{weights.origin} holds no {names}; its first tensors: {', '.join(list(weights)[:5])}")


def _build(name: str, family: Family, **kwargs: Any) -> FamilyModel:
    model = timm.create_model(name, **kwargs)
    if not isinstance(model, family.model):
        raise ConvertError(f"'{name}' is a {type(model).__name__}; the weights are those of {family.name}")
    return model


def _described(source: Path) -> tuple[Path, ModelConfig] | None:
    """The folder that a source is, or is in, and its config.json if that is timm's.

    Raises:
        ModelConfigError: The source is a folder whose config.json is damaged.
    """
    folder = source if source.is_dir() else source.parent
    try:
        config = find_model_config(folder)
    except ModelConfigError as error:
        if source.is_dir():
            raise
        _logger.warning("%s; it is ignored, as a file of weights was named", error)
        return None
    return None if config is None else (folder, config)


def _guess(family: Family, shapes: dict[str, Shape], path: Path) -> str:
    """The released model with these channels, depths and classes; without a tag if the number of classes differs.

    Of a family without released weights, the architecture.
    """
    size, classes = family.key_map.size(shapes), family.key_map.num_classes(shapes)
    variant = family.key_map.variant(shapes)
    tagged = [name for name in PUBLISHED if family_of(name) is family]
    names = list(dict.fromkeys(name.partition(".")[0] for name in tagged or family.architectures))
    fitting = [name for name in names if size is not None and _size_by_name(name, family) == (size, variant)]
    for name in tagged:
        cfg = timm.get_pretrained_cfg(name)
        if name.partition(".")[0] in fitting and cfg is not None and cfg.num_classes == classes:
            return name
    if not fitting:
        raise ConvertError(
            f"'{path}' is of no released size ({f'{variant} {size}'.strip() if size else 'no stem in it'}): name the "
            f"model that it belongs to, such as --model {family.architectures[0]}, and what differs from it, such as "
            f"--model-kwargs {family.example}"
        )
    return fitting[0]


@cache
def _size_by_name(name: str, family: Family) -> tuple[str | None, str]:
    state_dict = _build(name, family, device="meta").state_dict()
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    return family.key_map.size(shapes), family.key_map.variant(shapes)
