# SPDX-License-Identifier: MIT
"""Locations through several layers, and the dilation of a kernel, on layers whose points are known."""

import math

import pytest
import timm
import torch
import views
from torch import nn

from internimage.analysis import Logit, NodeError, Pooled, Position, composed_points, effective_dilation
from internimage.errors import UserError
from internimage.layers import DCNv3, DeformConv2d


def layers(count: int, dx: float = 0.0, dy: float = 0.0, stride: int = 1, **arguments) -> nn.Sequential:
    """3x3 layers of one offset group, all of whose points are moved alike."""
    toy = nn.Sequential(*(DeformConv2d(1, 1, 3, stride, 1, **arguments) for _ in range(count))).double()
    with torch.no_grad():
        for layer in toy:
            layer.conv_offset.bias.view(9, 2).copy_(torch.tensor([dy, dx], dtype=torch.float64))
    return toy


def table(points) -> dict[tuple[float, float], int]:
    """Ways by location."""
    found: dict[tuple[float, float], int] = {}
    for place, paths in zip(points.locations.tolist(), points.paths.tolist()):
        key = round(place[0], 9), round(place[1], 9)
        found[key] = found.get(key, 0) + paths
    return found


WAYS = [1, 3, 6, 7, 6, 3, 1]  # sums of three steps of -1, 0 or 1


def test_three_regular_layers_have_729_ways_to_7_x_7_places():
    points = composed_points(layers(3), torch.zeros(1, 16, 16), Position("2", x=8, y=7))
    assert table(points) == {(8 + i - 3, 7 + k - 3): WAYS[i] * WAYS[k] for i in range(7) for k in range(7)}
    assert points.paths.sum() == 729 and points.lost == 0
    assert points.layers == ("0", "1", "2") and points.node == "2 at column 8, row 7"
    two = composed_points(layers(3), torch.zeros(1, 16, 16), Position("2", x=8, y=7), layers=2)
    assert two.paths.sum() == 81 and two.layers == ("1", "2")


@pytest.mark.parametrize(("move", "rounded"), [(1.0, 1), (0.4, 0), (-0.4, 0), (0.6, 1)])
def test_locations_are_rounded_to_pixels_but_for_those_of_the_lowest_layer(move, rounded):
    points = composed_points(layers(3, dx=move), torch.zeros(1, 16, 16), Position("2", x=8, y=7))
    shift = 2 * rounded + move
    expected = {(round(8 + i - 3 + shift, 9), 7 + k - 3): WAYS[i] * WAYS[k] for i in range(7) for k in range(7)}
    assert table(points) == expected


def test_ways_through_a_border_are_lost():
    """At the corner of the map, 5 of 9 points of the upper layer are outside, each of 9 ways through the lower one."""
    points = composed_points(layers(2), torch.zeros(1, 16, 16), Position("1", x=0, y=0), layers=2)
    assert points.lost == 5 * 9 and points.paths.sum() == 4 * 9
    three = composed_points(layers(3), torch.zeros(1, 16, 16), Position("2", x=0, y=0))
    assert three.lost + three.paths.sum() == 729


def test_groups_and_strides():
    """Two groups are twice the ways in each layer. Places are pixels of the image: a position of the last of three
    halved maps covers 8 of them, and its points are 4, 2 and 1 pixels apart."""
    grouped = layers(2)
    grouped[1] = DeformConv2d(1, 2, 3, padding=1).double()
    grouped.append(DeformConv2d(2, 1, 3, padding=1, offset_groups=2).double())
    points = composed_points(grouped, torch.zeros(1, 16, 16), Position("2", x=8, y=8))
    assert points.paths.sum() == 2 * 729
    halved = composed_points(layers(3, stride=2), torch.zeros(1, 64, 64), Position("2", x=4, y=4))
    expected = {}
    for a in (-1, 0, 1):
        for b in (-1, 0, 1):
            for c in (-1, 0, 1):
                place = 2 * (2 * (2 * 4 + a) + b) + c
                expected[place] = expected.get(place, 0) + 1
    assert table(halved) == {(x, y): n * m for x, n in expected.items() for y, m in expected.items()}


def test_models():
    model, image = views.model("internimage_atto"), views.image(64, 64)
    points = composed_points(model, image, Position(3))
    assert points.layers == tuple(f"levels.2.blocks.{i}.dcn" for i in range(3))
    assert points.lost + points.paths.sum() == (4 * 9) ** 3
    new = composed_points(timm.create_model("resnet18", num_classes=3), image, Position("layer1"), plain=True)
    assert table(new).keys() == {(4 * x + 1.5, 4 * y + 1.5) for x in range(5, 12) for y in range(5, 12)}
    for node, count, message in (
        (Pooled(), 3, "composed points start at a position of a map, and 'pooled feature' is none"),
        (Logit(0), 3, "start at a position of a map, and 'logit of class 0' is none"),
        (Position(1), 3, "layers must be at most 1, which come before levels.0 at column 8, row 8, got 3"),
        (Position(3), 0, "layers must be a whole number from 1, got 0"),
        (Position(3), 1.5, "layers must be a whole number from 1, got 1.5"),
    ):
        with pytest.raises(NodeError, match=message):
            composed_points(model, image, node, layers=count)
    for view in (lambda m: composed_points(m, image, Position(3)), lambda m: effective_dilation(m, image)):
        with pytest.raises(UserError, match="'resnet18' has no deformable layers"):
            view(timm.create_model("resnet18", num_classes=3))


# ---- dilation


def test_the_dilation_of_regular_kernels():
    image = torch.zeros(1, 16, 20)
    (first, second) = effective_dilation(layers(2, dx=0.3), image)
    assert first.layer == "0" and first.dilation.shape == (16, 20, 1) and second.centers.shape == (16, 20, 2)
    assert (first.dilation - 1).abs().max() < 1e-14
    (wide,) = effective_dilation(nn.Sequential(DeformConv2d(1, 1, 3, 2, 2, 2)).double(), image)
    assert (wide.dilation - 2).abs().max() < 1e-14 and wide.centers[1, 2].tolist() == [4.5, 2.5]

    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    for remove_center in (False, True):
        toy = nn.Sequential(Last(), DCNv3(2, groups=2, offset_scale=1.5, remove_center=remove_center)).double()
        (scaled,) = effective_dilation(toy, torch.zeros(2, 16, 20))
        assert scaled.dilation.shape == (16, 20, 2) and (scaled.dilation - 1.5).abs().max() < 1e-14
    plain = effective_dilation(timm.create_model("resnet18", num_classes=3), torch.zeros(3, 32, 32), plain=True)
    assert len(plain) == 16 and all(torch.equal(each.dilation, torch.ones_like(each.dilation)) for each in plain)


def test_the_dilation_of_moved_points():
    """The lower right point moved by (3, 4): of 12 distances of 1, those to its two neighbors become |(1 + 3, 4)| and
    |(3, 1 + 4)|. In pixels of the layer's input, whatever those of the image."""
    toy = nn.Sequential(nn.AvgPool2d(2), *layers(1)).double()
    with torch.no_grad():
        toy[1].conv_offset.bias.view(9, 2)[8] = torch.tensor([4.0, 3.0])
    (found,) = effective_dilation(toy, torch.zeros(1, 16, 16))
    expected = (10 + math.hypot(4, 4) + math.hypot(3, 5)) / 12
    assert (found.dilation - expected).abs().max() < 1e-14


def test_mean_and_deviation_inside_an_area():
    (found,) = effective_dilation(layers(1, stride=2), torch.zeros(1, 8, 8))
    found.dilation[0, 0, 0], found.dilation[0, 1, 0] = 2.0, 4.0
    assert found.inside((0, 0, 4, 2), 8, 8) == (3.0, 1.0)
    assert found.inside((4, 4, 8, 8), 8, 8) == (1.0, 0.0)
    assert all(math.isnan(value) for value in found.inside((2, 2, 3, 3), 8, 8))  # centers are at 0.5, 2.5, ...
    with pytest.raises(NodeError, match="a mask must have the size of the image, 8 x 8"):
        found.inside(torch.ones(4, 4), 8, 8)
