# SPDX-License-Identifier: MIT
"""A model studied on an image: the views of several nodes, and where its layers sample, as one result."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.parts import NoSuchParts, sampling_layers, sampling_layers_of_stage
from .effective_points import EffectivePoints, effective_points
from .inspection import inspected
from .nodes import Node, OpenNode
from .points import sampled_points
from .receptive_field import ReceptiveField, effective_receptive_field
from .recording import recorded
from .saliency import SaliencyRegion, saliency_region

VIEWS = "erf", "points", "saliency"
"""The effective receptive field, the effective points and the saliency region."""

Progress = Callable[[str, int, int], None]
"""Called with the name of a view, the number of steps done and of all, or of those that it may take."""


@dataclass(frozen=True)
class Settings:
    """How the views are computed; see `effective_receptive_field`, `effective_points` and `saliency_region`."""

    projections: int | None = 8
    seed: int = 0
    plain: bool = False
    bound: float = 0.1
    cell: int = 16
    fill: str | Tensor = "median"
    budget: int = 1000


@dataclass(frozen=True, eq=False)
class NodeViews:
    """The views of a node; None for one that was not asked for.

    Attributes:
        node: What the node is, in words.
        center: The pixel (x, y) of the preprocessed image that it is at; None for a node of the whole image.
        field: Its receptive field.
        points: The points that it depends on.
        region: The region that gives it its value.
        masked: The image of that region, with the rest masked, as it looks: (3, H, W), uint8.
    """

    node: str
    center: tuple[float, float] | None
    field: ReceptiveField | None = None
    points: EffectivePoints | None = None
    region: SaliencyRegion | None = None
    masked: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerSampling:
    """Where a layer samples, for each of its output pixels, as `sampled_points` gives it.

    Attributes:
        layer: Name of the layer.
        locations: (Ho, Wo, groups, P, 2), float32, as (x, y) in pixels of the preprocessed image.
        weights: (Ho, Wo, groups, P), float32.
    """

    layer: str
    locations: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Study:
    """What `study` returns.

    Attributes:
        model: Name of the model.
        pixels: The preprocessed image as it looks, (3, H, W), uint8.
        nodes: The views of each node.
        sampling: Layers of the model, the one that is shown first at the front; empty for a model without any.
    """

    model: str
    pixels: Tensor
    nodes: tuple[NodeViews, ...]
    sampling: tuple[LayerSampling, ...]


def supported_views(model: nn.Module, plain: bool) -> tuple[str, ...]:
    """The views that a model has: all but the points of one that has no layers with points.

    Args:
        model: Any model.
        plain: Whether plain 3x3 convolutions count as layers with points.
    """
    try:
        with recorded(model, torch.zeros(1, 3, 1, 1), plain):
            return VIEWS
    except NoSuchParts:
        return tuple(view for view in VIEWS if view != "points")


def check(model: nn.Module, image: Tensor, nodes: Iterable[Node], views: Sequence[str], plain: bool) -> list[OpenNode]:
    """Check that a model has nodes and views, which takes a forward pass for each node.

    Returns:
        The nodes, open in the model and evaluated.

    Raises:
        UserError: It has no such node, or no layers for the points.
        NotFiniteView: There is NaN or infinity in the weights or in the image.
    """
    opened = [node.open(model) for node in nodes]
    with inspected(model, image) as batch, torch.no_grad():
        if "points" in views:
            with recorded(model, batch, plain):
                pass  # which names the views that work
        for each in opened:
            each.values(batch)
    return opened


def study(
    model: nn.Module,
    name: str,
    image: Tensor,
    to_pixels: Callable[[Tensor], Tensor],
    nodes: Sequence[Node],
    views: Sequence[str] = VIEWS,
    settings: Settings = Settings(),  # noqa: B008  # frozen
    layer: str | int | None = None,
    progress: Progress | None = None,
) -> Study:
    """Compute the views of several nodes of a model, and where its layers sample.

    Args:
        model: Any model for "erf" and "saliency"; left as it is.
        name: Of the model, for pictures.
        image: (C, H, W), preprocessed.
        to_pixels: A preprocessed image -> as it looks, (3, H, W), uint8, such as of `canvas.to_pixels`.
        nodes: At least one.
        views: Some of `VIEWS`.
        settings: Of the views.
        layer: Where the sampling is shown first: a layer, a module with some, or a stage; None for stage 3.
        progress: Called after each step.

    Raises:
        UserError: As `check`.
        NotFiniteView: There is NaN or infinity in the weights, in the image or in what comes of them.
    """
    opened = check(model, image, nodes, views, settings.plain)
    found = tuple(
        _views(model, image, to_pixels, *pair, views, settings, progress or _silent) for pair in zip(nodes, opened)
    )
    return Study(name, to_pixels(image), found, tuple(_sampling(model, image, layer)))


def _silent(view: str, done: int, total: int) -> None:
    pass


def _views(
    model: nn.Module,
    image: Tensor,
    to_pixels: Callable[[Tensor], Tensor],
    node: Node,
    opened: OpenNode,
    views: Sequence[str],
    settings: Settings,
    progress: Progress,
) -> NodeViews:
    field = points = region = masked = None
    if "erf" in views:
        field = effective_receptive_field(
            model, image, node, settings.projections, settings.seed, lambda done, all_: progress("erf", done, all_)
        )
    if "points" in views:
        points = effective_points(model, image, node, settings.projections, settings.seed, settings.plain)
        progress("points", 1, 1)
    if "saliency" in views:
        region = saliency_region(
            model, image, node, settings.bound, settings.cell, settings.fill, settings.budget,
            lambda done: progress("saliency", done, settings.budget),
        )  # fmt: skip
        progress("saliency", settings.budget, settings.budget)
        masked = to_pixels(region.masked)
    return NodeViews(opened.text(), opened.center(), field, points, region, masked)


def _sampling(model: nn.Module, image: Tensor, layer: str | int | None) -> list[LayerSampling]:
    """The last layer of each stage, the one that is asked for first."""
    layers = list(sampling_layers(model))
    if not layers:
        return []
    stages = [found[-1] for stage in range(1, 9) if (found := sampling_layers_of_stage(model, stage))]
    if isinstance(layer, int):
        wanted = sampling_layers_of_stage(model, layer)[-1:]
    elif layer is None:
        wanted = sampling_layers_of_stage(model, 3)[-1:]
    else:
        wanted = [each for each in layers if each == layer or each.startswith(f"{layer}.")][-1:]
    result = []
    with inspected(model, image) as batch:
        for each in dict.fromkeys([*wanted, *(stages or layers[-1:])]):
            _, locations, weights = sampled_points(model, batch, each)
            result.append(LayerSampling(each, locations[0].cpu(), weights[0].cpu()))
    return result
