# SPDX-License-Identifier: MIT
"""A study: its views are those of the functions, and its numbers and arrays are theirs."""

import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
import views
from torch import nn

from internimage.analysis import (
    EffectivePoints,
    LayerPoints,
    Logit,
    NodeError,
    NotFiniteView,
    Position,
    effective_points,
    effective_receptive_field,
    saliency_region,
    sampled_points,
)
from internimage.analysis.canvas import to_pixels
from internimage.analysis.results import arrays, numbers, of_each_resolution, points_with_half
from internimage.analysis.study import VIEWS, Settings, check, study, supported_views
from internimage.models.parts import NoSuchParts

SHOWN = partial(to_pixels, mean=(0.5,) * 3, std=(0.25,) * 3)
NODES = [Logit(1), Position(3, 0, 1)]
SETTINGS = Settings(projections=2, seed=3, cell=8, bound=0.02, budget=60)


@pytest.fixture(scope="module")
def model():
    return views.model("internimage_atto")


@pytest.fixture(scope="module")
def found(model):
    steps = []
    result = study(
        model, "mine", views.image(), SHOWN, NODES, VIEWS, SETTINGS, progress=lambda *step: steps.append(step)
    )
    return result, steps


def test_the_views_are_those_of_the_functions(model, found):
    result, _ = found
    image = views.image()
    assert result.model == "mine" and torch.equal(result.pixels, SHOWN(image))
    for node, one in zip(NODES, result.nodes):
        field = effective_receptive_field(model, image, node, 2, 3)
        assert torch.equal(one.field.sensitivity, field.sensitivity) and one.node == field.node
        points = effective_points(model, image, node, 2, 3)
        for a, b in zip(one.points.layers, points.layers, strict=True):
            assert a.layer == b.layer and torch.equal(a.strength, b.strength)
        region = saliency_region(model, image, node, 0.02, 8, "median", 60)
        assert torch.equal(one.region.cells, region.cells) and one.region.error == region.error
        assert torch.equal(one.masked, SHOWN(region.masked))
    assert result.nodes[0].center is None and result.nodes[1].center == (7.5, 23.5)  # of 2 x 2 positions of 16 pixels


def test_progress_counts_up_to_all_of_each_view(found):
    _, steps = found
    for view in VIEWS:
        of_view = [(done, total) for name, done, total in steps if name == view]
        assert of_view and of_view[-1][0] == of_view[-1][1] and all(done <= total for done, total in of_view)


def test_the_sampling_of_the_last_layer_of_each_stage_with_the_wanted_one_first(model, found):
    result, _ = found
    names = [layer.layer for layer in result.sampling]
    assert names[0] == "levels.2.blocks.2.dcn"
    assert sorted(names) == [f"levels.{i}.blocks.{j}.dcn" for i, j in ((0, 0), (1, 0), (2, 2), (3, 0))]
    for layer in result.sampling:
        _, locations, weights = sampled_points(model, views.image()[None], layer.layer)
        assert torch.equal(layer.locations, locations[0]) and torch.equal(layer.weights, weights[0])
    for wanted, first in ((1, "levels.0.blocks.0.dcn"), ("levels.2.blocks.1", "levels.2.blocks.1.dcn")):
        other = study(model, "mine", views.image(), SHOWN, [Logit(0)], ("erf",), SETTINGS, wanted)
        assert other.sampling[0].layer == first and len(other.sampling) in (4, 5)


def test_a_model_without_deformable_layers():
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=3).eval()
    image = views.image(64, 64).float()
    assert supported_views(plain, False) == ("erf", "saliency") and supported_views(plain, True) == VIEWS
    result = study(plain, "plain", image, SHOWN, [Logit(0)], ("erf",), SETTINGS)
    assert result.sampling == () and result.nodes[0].points is None
    with pytest.raises(NoSuchParts, match="'resnet10t' has no deformable layers .plain=True takes .*region work"):
        study(plain, "plain", image, SHOWN, [Logit(0)], VIEWS, SETTINGS)
    with_points = study(plain, "plain", image, SHOWN, [Logit(0)], ("points",), Settings(plain=True))
    assert not any(layer.deformable for layer in with_points.nodes[0].points.layers)
    linear = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert supported_views(linear, True) == ("erf", "saliency")


@pytest.mark.parametrize(
    "node, error",
    [
        (Logit(3), "has classes 0 to 2, got 3"),
        (Position("levels.9"), "levels.9"),
        (Position(3, 2, 0), "has columns x 0 to 1 and rows y 0 to 1 for this image, got .2, 0."),
    ],
)
def test_everything_is_checked_before_anything_is_computed(model, node, error):
    steps = []
    with pytest.raises(NodeError, match=error):
        study(model, "mine", views.image(), SHOWN, [Logit(0), node], VIEWS, SETTINGS, None, lambda *s: steps.append(s))
    assert steps == []


def test_weights_and_images_that_are_not_finite():
    broken = views.model("internimage_atto")
    with torch.no_grad():
        broken.levels[0].blocks[0].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(NotFiniteView, match="the weights of 'internimage_atto' have NaN or infinity .levels.0.blocks"):
        check(broken, views.image(), [Logit(0)], VIEWS, False)
    with pytest.raises(NotFiniteView, match="the image has NaN or infinity"):
        check(views.model("internimage_atto"), views.image() * float("inf"), [Logit(0)], VIEWS, False)


# ---- results


def layer(name, strength, size=(1, 1)):
    strength = torch.tensor(strength).double().view(*size, 1, -1)
    return LayerPoints(name, torch.zeros(*strength.shape, 2).double(), strength, True)


def test_points_with_half_of_the_strength():
    """By hand: 5 of 10 is one point; 4 of 10 and 3 more are two."""
    assert points_with_half(layer("a", [5.0, 1.0, 2.0, 2.0])) == 1
    assert points_with_half(layer("a", [1.0, 4.0, 3.0, 2.0])) == 2
    assert points_with_half(layer("a", [1.0] * 9)) == 5
    assert points_with_half(layer("a", [0.0, 0.0])) == 0


def test_the_last_layer_of_each_resolution():
    sizes = {"a": (2, 2), "b": (2, 2), "c": (1, 1), "d": (1, 2)}
    layers = tuple(layer(name, [1.0] * (rows * columns), (rows, columns)) for name, (rows, columns) in sizes.items())
    points = EffectivePoints(layers, "a node", None)
    assert [each.layer for each in of_each_resolution(points)] == ["b", "c", "d"]


def test_the_numbers_are_those_of_the_views_and_json(found):
    result, _ = found
    shown = json.loads(json.dumps(numbers(result), allow_nan=False))
    assert (shown["model"], shown["height"], shown["width"]) == ("mine", 32, 32)
    for node, one in zip(shown["nodes"], result.nodes, strict=True):
        assert node["node"] == one.node and [node["x"], node["y"]] == list(one.center or (None, None))
        assert node["erf"]["largest_sensitivity"] == float(one.field.sensitivity.max())
        assert node["erf"]["square_50"] == one.field.square_side(0.5)
        assert [each["layer"] for each in node["points"]] == [each.layer for each in one.points.layers]
        assert node["points"][0]["points"] == 8 * 8 * one.points.layers[0].strength.shape[2] * 9
        saliency = node["saliency"]
        assert saliency["error"] == one.region.error <= 0.02 and saliency["text"] == one.region.text
        assert saliency["cells"] == int(one.region.cells.sum()) and saliency["all_cells"] == 16


def test_the_arrays_are_stored_under_their_names(found, tmp_path):
    result, _ = found
    np.savez_compressed(tmp_path / "views.npz", **arrays([result, result]))
    stored = np.load(tmp_path / "views.npz")
    assert stored["model2/name"] == "mine" and stored["model1/node2/name"] == result.nodes[1].node
    assert np.array_equal(stored["model1/image"], result.pixels.permute(1, 2, 0))
    assert np.array_equal(stored["model1/node1/erf/sensitivity"], result.nodes[0].field.sensitivity)
    name = result.nodes[0].points.layers[0].layer
    locations = result.nodes[0].points.layers[0].locations
    assert np.array_equal(stored[f"model1/points/{name}/locations"], locations.float())
    assert stored[f"model2/node2/points/{name}/strength"].shape == locations.shape[:-1]
    assert np.array_equal(stored["model1/node2/saliency/mask"], result.nodes[1].region.mask)
    sampling = result.sampling[0]
    assert np.array_equal(stored[f"model1/sampling/{sampling.layer}/weights"], sampling.weights)
    assert {key.split("/")[0] for key in stored.files} == {"model1", "model2"}
