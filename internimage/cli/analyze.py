# SPDX-License-Identifier: MIT
"""`internimage analyze`."""

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from tqdm import tqdm

from ..analysis import Logit, Node, NodeError, Position, map_of, predicted_class
from ..analysis import study as studies
from ..analysis.canvas import to_pixels
from ..analysis.fills import FILLS
from ..analysis.folder import ARRAYS, PAGE, check_destination, write
from ..analysis.page import page, pictures
from ..analysis.results import arrays, numbers
from ..analysis.study import VIEWS, Settings, Study
from ..data.datasets import EvaluationTransform
from ..data.placement import Placement, placement
from ..engine.create import create_model
from ..progress import ProgressLines, message, progress_bar
from ..tasks.classification.predict import image_mode, preprocess, read_image
from ..terminal import say
from .arguments import load_model

_PROG = "internimage analyze"
_TITLES = {"erf": "receptive field", "points": "effective points", "saliency": "saliency region"}


@dataclass
class _Seen:
    """A model, and the image as it sees it."""

    name: str
    model: nn.Module
    config: dict[str, Any]
    image: Tensor
    place: Placement
    layer: str | int | None
    control: bool = False
    nodes: Sequence[Node] = ()


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.output)
    check_destination(folder)
    read_image(Path(arguments.image), arguments.image)  # before models are loaded
    seen = _load(arguments)
    _add_nodes(seen, arguments)
    views, notes = _views(seen, arguments)
    for one in seen:
        studies.check(one.model, one.image, one.nodes, views, arguments.plain)
    found = []
    for one in seen:
        with _Bars(one.name) as bars:
            settings = _settings(one, arguments)
            shown = partial(to_pixels, mean=one.config["mean"], std=one.config["std"])
            found.append(
                studies.study(one.model, one.name, one.image, shown, one.nodes, views, settings, one.layer, bars.step)
            )
    _write(folder, Path(arguments.image).name, seen, found, notes)
    _print(arguments, seen, found, folder)
    return 0


# ---- what is analyzed


def _load(arguments: argparse.Namespace) -> list[_Seen]:
    layers: list[str | int | None] = [_layer(text) for text in arguments.layer] or [None]
    layers = layers * len(arguments.model) if len(layers) == 1 else layers
    seen = []
    for name, layer in zip(arguments.model, layers):
        one = argparse.Namespace(**{**vars(arguments), "model": name})
        model, config, device, dtype = load_model(one)
        shown = Path(name).name if Path(name).is_dir() else name
        seen.append(_seen(shown, model.to(device, dtype), config, arguments.image, layer, control=False))
        if arguments.control:
            control = _untrained(name, model, arguments)
            seen.append(
                _seen(f"{shown} (untrained)", control.to(device, dtype), config, arguments.image, layer, control=True)
            )
    return seen


def _untrained(name: str, model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    """The same model with new weights, the same for the same seed."""
    classes: Any = getattr(model, "num_classes", None)
    make = partial(create_model, name, pretrained=False, num_classes=classes, img_size=arguments.img_size)
    torch.manual_seed(arguments.seed)
    control = make()
    if isinstance(control, ResNet):  # whose blocks would all add zero
        torch.manual_seed(arguments.seed)
        control = make(zero_init_last=False)
    return control


def _seen(
    name: str, model: nn.Module, config: dict[str, Any], path: str, layer: str | int | None, control: bool
) -> _Seen:
    image = read_image(Path(path), path, image_mode(config))
    pixels = preprocess(EvaluationTransform(config), image, path)
    return _Seen(name, model, config, pixels, placement(config, image), layer, control)


def _layer(text: str) -> str | int:
    """A stage or the name of a module."""
    return int(text) if text.isdecimal() else text


def _add_nodes(seen: Sequence[_Seen], arguments: argparse.Namespace) -> None:
    """The class's logit, and a position for each place; by default the predicted class, and the middle.

    An untrained model is asked for the class that the trained one before it predicts.
    """
    label = vars(arguments)["class"]
    predicted: int | None = None
    for one in seen:
        nodes: list[Node] = []
        classes: Any = getattr(one.model, "num_classes", None)
        if label is not None or classes != 0:
            if label is None and not one.control:
                predicted = predicted_class(one.model, one.image)
            nodes.append(Logit(predicted if label is None else label))
        positions = map_of(one.model, one.image, one.layer)
        places = [one.place.checked(*at) for at in arguments.at]
        if not places:
            height, width = one.image.shape[1:]
            places = [((width - 1) / 2, (height - 1) / 2)]
        one.nodes = [*nodes, *(Position(one.layer, *positions.from_image(*place)) for place in places)]
    counts = {one.name: len(one.nodes) for one in seen}
    if len(set(counts.values())) > 1:
        without = min(counts, key=lambda name: counts[name])
        raise NodeError(f"'{without}' has no classes and other models have: it cannot stand beside them")


def _views(seen: Sequence[_Seen], arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The views to compute, and notes. By default those that one of the models has at least; what was asked for must
    be there in all of them."""
    if arguments.views is not None:
        return list(arguments.views), []
    without = [one.name for one in seen if "points" not in studies.supported_views(one.model, arguments.plain)]
    if not without:
        return list(VIEWS), []
    names = " and ".join(without)
    note = (
        f"{names} has no deformable layers, so there is no view of sampling points; --plain takes plain 3x3 "
        f"convolutions, if there are some"
    )
    message(f"{_PROG}: {note}")
    return [view for view in VIEWS if view != "points"], [note]


def _settings(one: _Seen, arguments: argparse.Namespace) -> Settings:
    fill: str | Tensor = arguments.fill
    if fill not in FILLS:
        image = read_image(Path(arguments.fill), arguments.fill, image_mode(one.config))
        fill = preprocess(EvaluationTransform(one.config), image, arguments.fill)
    projections = None if arguments.projections == "exact" else arguments.projections
    return Settings(
        projections, arguments.seed, arguments.plain, arguments.bound, arguments.cell, fill, arguments.budget
    )


class _Bars:
    """A progress bar for each view, which appears after two seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.view = name, ""
        self.bar: tqdm[Any] | ProgressLines | None = None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, view: str, done: int, total: int) -> None:
        if self.bar is None or view != self.view or done < self.bar.n:
            self.__exit__()
            title = f"{self.name}: {_TITLES[view]}"
            self.view, self.bar = view, progress_bar(total, title, "passes", leave=False, delay=2)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
            self.bar = None


# ---- results


def _write(folder: Path, image: str, seen: Sequence[_Seen], found: Sequence[Study], notes: list[str]) -> None:
    shown = pictures(found)
    data = io.BytesIO()
    np.savez_compressed(data, **arrays(found))
    text = page(image, found, [*notes, *map(_crop_note, dict.fromkeys(one.place for one in seen))], shown)
    write(folder, {**shown, ARRAYS: data.getvalue(), PAGE: text.encode()})


def _crop_note(place: Placement) -> str:
    left, right, top, bottom = place.seen()
    return (
        f"The image has {place.width} x {place.height} pixels; resized and cropped to {place.model_width} x "
        f"{place.model_height}, it shows columns {left} to {right} and rows {top} to {bottom}. Pixels on this page are "
        f"those of the image that the model sees."
    )


def _print(arguments: argparse.Namespace, seen: Sequence[_Seen], found: Sequence[Study], folder: Path) -> None:
    result = [numbers(one) for one in found]
    for one, each in zip(seen, result):
        for node in each["nodes"]:
            given = None if node["x"] is None else one.place.from_model(node["x"], node["y"])
            node["given_x"], node["given_y"] = (None, None) if given is None else (round(v, 2) for v in given)
    if arguments.json:
        print(json.dumps({"image": arguments.image, "page": str(folder / PAGE), "models": result}, allow_nan=False))
        return
    for each in result:
        say(f"{each['model']}, {each['width']} x {each['height']} pixels")
        for node in each["nodes"]:
            at = "" if node["given_x"] is None else f" (pixel {node['given_x']:.0f},{node['given_y']:.0f} of the image)"
            say(f"  {node['node']}{at}")
            for line in _lines(node):
                say(f"    {line}")
    say(f"page: {folder / PAGE}")


def _lines(node: dict[str, Any]) -> list[str]:
    lines = []
    if "erf" in node:
        squares = [node["erf"][key] for key in ("square_50", "square_99")]
        texts = ["no square" if side is None else f"{side:.0f} pixels" for side in squares]
        lines.append(f"receptive field: 50 % of the energy in a square of {texts[0]}, 99 % in {texts[1]}")
    if "points" in node:
        strongest = max(node["points"], key=lambda layer: layer["largest_strength"])
        lines.append(
            f"effective points: {len(node['points'])} layers; strongest in {strongest['layer']}, where "
            f"{strongest['points_with_half_of_the_strength']} of {strongest['points']} points have half of the strength"
        )
    if "saliency" in node:
        lines.append(f"saliency region: {node['saliency']['text']}")
    return lines
