# SPDX-License-Identifier: MIT
"""Parts and properties of any timm model, for the engine and the analysis.

Models of this package answer by methods (`HasParts`, `ChecksImageSize`). For others, the parts are derived from what
timm provides: `group_matcher`, which groups parameters into layers, and `feature_info`, the resolutions of the feature
maps. If that gives no sensible answer, an error names the model.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ..errors import UserError
from ..layers.sampling import PredictsOffsets, SamplingLayer
from .attributes import name_of

_Layer = tuple[float, ...]  # position among the layers, as in timm's group_matcher

# marks what follows the last block in timm's matchers
_TAIL = 99999.0


class NoSuchParts(UserError, ValueError):
    """A model that lacks the parts that were asked for. The message names it."""


@runtime_checkable
class HasParts(Protocol):
    """A model that knows its parts."""

    def get_stem(self) -> Sequence[nn.Module]:
        """What precedes the first stage."""

    def get_stages(self) -> Sequence[nn.Module]:
        """The stages, in order of execution."""

    def get_blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks of all stages, in order of execution."""


@runtime_checkable
class ChecksImageSize(Protocol):
    """A model that knows which image sizes it takes."""

    def check_image_size(self, height: int, width: int) -> None:
        """Raise ValueError for a size that it does not take; the message names sizes that it takes."""


# ---- stages and blocks


def stem_and_stages(model: nn.Module) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The modules of the stem, and those of each stage: the layers at one resolution, with the downsampling to it.

    Raises:
        NoSuchParts: The model has no stages, such as a plain vision transformer.
    """
    if isinstance(model, HasParts):
        return list(model.get_stem()), [[stage] for stage in model.get_stages()]
    stem, layers = _layers(model, coarse=True)
    ends: dict[int, _Layer] = {}  # reduction -> the last layer that has it
    for info in getattr(model, "feature_info", None) or ():
        last = [layer for layer, keys in layers.items() if any(_is_below(key, info["module"]) for key in keys)]
        if last:
            ends[info["reduction"]] = max(last)
    if len(ends) < 2:
        raise NoSuchParts(f"'{name_of(model)}' has no stages of several resolutions")
    stages, begin = [], 0
    order = sorted(layers)
    # feature_info may name what follows the last stage for it
    for end in [order.index(layer) + 1 for layer in sorted(ends.values())] + [len(order)]:
        if end > begin:
            stages.append(_modules(model, [key for layer in order[begin:end] for key in layers[layer]]))
        begin = end
    return _modules(model, stem), stages


def stage_maps(model: nn.Module) -> list[tuple[int, str]]:
    """Where the map of each stage is: its index for timm's `forward_intermediates`, and the name of its module.

    By timm's `feature_info`, without the entries of the stem. A model of one resolution, such as a plain vision
    transformer, has an entry for each block. Empty if there is none.
    """
    try:
        stem = set(_layers(model, coarse=True)[0])
    except NoSuchParts:
        stem = set()
    found = []
    for index, info in enumerate(getattr(model, "feature_info", None) or ()):
        try:
            module = model.get_submodule(info["module"])
        except (AttributeError, KeyError):
            continue
        if any(f"{info['module']}.{key}" not in stem for key, _ in module.named_parameters()):
            found.append((index, str(info["module"])))
    return found


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is a sequence of, as modules that are called, to be sharded one by one.

    Raises:
        NoSuchParts: timm cannot group the model's parameters into them, or there is only one.
    """
    if isinstance(model, HasParts):
        return list(model.get_blocks())
    _, layers = _layers(model, coarse=False)
    blocks = [module for _, keys in sorted(layers.items()) for module in _called(_covering(model, "", set(keys)))]
    if len(blocks) < 2:
        raise NoSuchParts(f"'{name_of(model)}' has no repeated blocks")
    return blocks


def _layers(model: nn.Module, coarse: bool) -> tuple[list[str], dict[_Layer, list[str]]]:
    """The names of the stem's parameters, and those of each layer after it, without what follows the last block."""
    ask = getattr(model, "group_matcher", None)
    try:
        matcher = ask(coarse=coarse) if callable(ask) else None
    except AssertionError:  # where timm has not written the one that is asked for
        matcher = None
    if not isinstance(matcher, dict) or "stem" not in matcher or len(matcher) < 2:
        raise NoSuchParts(f"'{name_of(model)}' does not group its parameters into layers (timm's group_matcher)")
    patterns = [
        (group, re.compile(pattern), tuple(suffix or ()))
        for group, entry in matcher.items()
        for pattern, suffix in ([(entry, None)] if isinstance(entry, str) else entry or ())
    ]
    order = list(matcher)
    stem: list[str] = []
    layers: dict[_Layer, list[str]] = {}
    for key, _ in model.named_parameters():
        for group, pattern, suffix in patterns:
            match = pattern.match(key)
            if match is None:
                continue
            numbers = [float(number) for number in match.groups() if number is not None]
            layer = (float(order.index(group)), *numbers, *map(float, suffix))
            if group == "stem":
                stem.append(key)
            elif _TAIL not in layer:
                layers.setdefault(layer, []).append(key)
            break
    return stem, layers


def _is_below(key: str, module: str) -> bool:
    """Whether a parameter belongs to a module, by their names."""
    return key.startswith(f"{module}.")


def _modules(model: nn.Module, keys: list[str]) -> list[nn.Module]:
    """The modules that hold these parameters and no others.

    Raises:
        NoSuchParts: One of the parameters is not in such a module.
    """
    modules = _covering(model, "", set(keys))
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    loose = [key for key in keys if id(model.get_parameter(key)) not in held]
    if loose:
        raise NoSuchParts(f"'{name_of(model)}' cannot be split into stages: '{loose[0]}' is in no module of one")
    return modules


def _covering(module: nn.Module, prefix: str, keys: set[str]) -> list[nn.Module]:
    """The largest modules all of whose parameters are among the keys."""
    own = {f"{prefix}{key}" for key, _ in module.named_parameters()}
    if not own & keys:
        return []
    if own <= keys:
        return [module]
    return [found for name, child in module.named_children() for found in _covering(child, f"{prefix}{name}.", keys)]


def _called(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules, with the items of lists of modules instead of the lists, which are not called."""
    return [
        called
        for module in modules
        for called in (_called(module.children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else [module])
        if any(True for _ in called.parameters())
    ]


# ---- layers that sample


def sampling_layers(model: nn.Module) -> dict[str, SamplingLayer]:
    """The layers that sample at predicted locations, by name in order of execution."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SamplingLayer)}


def offset_layers(model: nn.Module) -> dict[str, PredictsOffsets]:
    """Those of `sampling_layers` whose offsets can be read and added to, as the views of locations do."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PredictsOffsets)}


def sampling_layers_of_stage(model: nn.Module, stage: int) -> list[str]:
    """The names of those in one stage, from 1; empty if the model has no such stage, or the stage none of them."""
    try:
        _, stages = stem_and_stages(model)
    except NoSuchParts:
        return []
    modules = stages[stage - 1] if stage <= len(stages) else []
    inside = {id(part) for module in modules for part in module.modules()}
    return [name for name, layer in sampling_layers(model).items() if id(layer) in inside]


def offset_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that predict sampling locations.

    Raises:
        NoSuchParts: There are none.
    """
    found = [parameter for layer in sampling_layers(model).values() for parameter in layer.offset_parameters()]
    if not found:
        raise NoSuchParts(f"'{name_of(model)}' has no layers that sample at learned offsets, such as DCNv3")
    return found


# ---- images


def check_image_size(model: Any, height: int, width: int) -> bool:
    """Check that a model takes images of a size; returns False if it cannot tell.

    Raises:
        ValueError: It does not; the message names sizes that it takes.
    """
    if not isinstance(model, ChecksImageSize):
        return False
    model.check_image_size(height, width)
    return True
