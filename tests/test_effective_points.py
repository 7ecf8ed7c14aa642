# SPDX-License-Identifier: MIT
"""Effective sampling locations: strengths against finite differences of the location, and on known images."""

import math

import pytest
import timm
import torch
import views
from torch import nn

from internimage.analysis import (
    LayerPoints,
    Logit,
    NodeError,
    NotFiniteView,
    Pooled,
    Position,
    effective_points,
    sampled_points,
)
from internimage.errors import UserError
from internimage.layers import DCNv3, DeformConv2d, ModulatedDeformConv2d
from internimage.models import deform_convolutions

# A central difference over 2e-4 image pixels misses a third derivative: the gelus and norms in between have some that
# are, with the gradients of these models, below 1e3 times the derivative, so the deviation is below 1e3 * 1e-8 / 6; the
# rounding of the node's value, 1e-15, is divided by 2e-4. Strengths are compared relative to the layer's largest one.
STEP, DIFFERENCE = 1e-4, 1e-5


def values(model, image, node) -> torch.Tensor:
    """The node by the model's own methods, (D,); a position's layer is the index of its map."""
    with torch.no_grad():
        if isinstance(node, Pooled):
            return model.forward_head(model.forward_features(image[None]), pre_logits=True)[0]
        if isinstance(node, Logit):
            return model(image[None])[0, node.label, None]
        maps = model.forward_intermediates(image[None], intermediates_only=True)
        vector = maps[node.layer][0, :, node.y, node.x]
        return vector if node.channel is None else vector[node.channel, None]


def moved(model, layer, image, node, place, axis, step) -> torch.Tensor:
    """The node's value where one location of a layer is moved by some image pixels along x (0) or y (1).

    The place is (row, column, group, point). Offsets are found by the documented order of channels, in pixels of the
    layer's input, for DCNv3 in parts of offset_scale.
    """
    row, column, group, point = place
    module = model.get_submodule(layer)
    size = []
    before = module.register_forward_pre_hook(lambda m, inputs: size.append(m.input_size(inputs[0])))

    def change(m, inputs, output):
        output = output.clone()
        side = image.shape[2 - axis] / size[0][1 - axis]  # image pixels per pixel of the layer's input
        if isinstance(module, DCNv3):
            points = output.shape[-1] // (2 * module.groups)
            output[0, row, column, (group * points + point) * 2 + axis] += step / side / module.offset_scale
        else:
            channel = (group * 9 + point) * 2 + (1 - axis)  # (y, x)
            output[0, channel, row, column] += step / side
        return output

    offsets = module.offset if isinstance(module, DCNv3) else module.conv_offset
    after = offsets.register_forward_hook(change)
    try:
        return values(model, image, node)
    finally:
        before.remove()
        after.remove()


def check(model, image, node, points, places, step=STEP, tolerance=DIFFERENCE, central=True) -> None:
    """Compare the strengths of some places of each layer with finite differences."""
    resting = values(model, image, node)
    for layer in points.layers:
        assert layer.strength.max() > 0
        generator = torch.Generator().manual_seed(len(layer.layer))
        strongest = [int(index) for index in layer.strength.flatten().topk(places).indices]
        anywhere = torch.randint(layer.strength.numel(), (places,), generator=generator).tolist()
        for flat in [*strongest, *anywhere]:
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), layer.strength.shape))
            if not central and (layer.locations[place] < 0).any():
                continue  # at the very end of the border of zeros, where the operators have no derivative
            total = 0.0
            for axis in (0, 1):
                more = moved(model, layer.layer, image, node, place, axis, step)
                less = moved(model, layer.layer, image, node, place, axis, -step) if central else resting
                total += float(((more - less) / (2 * step if central else step)).square().sum())
            deviation = abs(math.sqrt(total) - float(layer.strength[place])) / float(layer.strength.max())
            assert deviation < tolerance, (layer.layer, place)


ATTO = [Position(2, 1, 0, 3), Position(2, 1, 0), Pooled(), Logit(1)]


@pytest.mark.parametrize("node", ATTO, ids=["channel", "position", "pooled", "logit"])
def test_strengths_of_internimage_are_derivatives_of_the_location(node):
    model, image = views.model("internimage_atto", offset_scale=0.7), views.image()
    asked = Position(3, node.x, node.y, node.channel) if isinstance(node, Position) else node
    points = effective_points(model, image, asked, projections=None)
    assert len(points.layers) == (5 if isinstance(node, Position) else 6)
    check(model, image, node, points, 2)


def test_strengths_with_the_arguments_of_huge():
    model, image = views.model("internimage_atto", **views.HUGE, offset_scale=1.3), views.image(32, 64)
    points = effective_points(model, image, Logit(0))
    assert [layer.strength.shape[-1] for layer in points.layers] == [8] * 6
    check(model, image, Logit(0), points, 2)


@pytest.mark.parametrize("arguments", [{}, dict(modulated=False, offset_groups=2)], ids=["v2", "v1 in groups"])
def test_strengths_of_deformable_resnets(arguments):
    model, image = views.model("small resnet", **arguments), views.image(64, 32)
    points = effective_points(model, image, Logit(2))
    names = [f"layer{i}.0.conv{k}" for i in (2, 3, 4) for k in (1, 2)]
    assert [layer.layer for layer in points.layers] == names and points.projections is None
    assert {layer.strength.shape[2] for layer in points.layers} == {arguments.get("offset_groups", 1)}
    check(model, image, Logit(2), points, 2)
    before = effective_points(model, image, Position("layer3.0.bn1", 1, 1), projections=None)
    assert [layer.layer for layer in before.layers] == names[:3]


def test_only_points_on_which_the_node_depends_have_strength():
    """The last layer's points that are not those of the position; and layers after the node are not there."""
    model, image = views.model("internimage_atto"), views.image(64, 64)
    (layer,) = effective_points(model, image, Position("levels.0.blocks.0.dcn", x=3, y=9)).layers
    assert layer.layer == "levels.0.blocks.0.dcn"
    assert layer.strength[9, 3].all()
    rest = layer.strength.clone()
    rest[9, 3] = 0
    assert not rest.any()


def test_locations_are_those_of_the_layer():
    for name in ("internimage_atto", "small resnet"):
        model, image = views.model(name), views.image(64, 96)
        points = effective_points(model, image, Pooled())
        for layer in points.layers:
            _, locations, _ = sampled_points(model, image[None], layer.layer)
            assert (layer.locations - locations[0]).abs().max() < 1e-4  # which are in float32
            assert layer.strength.shape == layer.locations.shape[:-1]


def test_projections_of_a_vector():
    """One pass is the gradient of one number; the mean of the squares over seeds approaches the exact one."""
    model, image, node = views.model("internimage_atto"), views.image(), Position(3, 1, 0)
    exact = effective_points(model, image, node, projections=None)
    once = effective_points(model, image, node)
    assert exact.projections is None and once.projections == 1
    again = effective_points(model, image, node)
    other = effective_points(model, image, node, seed=1)
    for a, b, c in zip(once.layers, again.layers, other.layers):
        assert torch.equal(a.strength, b.strength) and not torch.equal(a.strength, c.strength)
    many = effective_points(model, image, node, projections=63)
    for a, b in zip(exact.layers, many.layers):
        # the variance of a square is below 2: six times sqrt(2 / 63) of it, and its root deviates by less
        deviation = (b.strength.square() - a.strength.square()).abs() / a.strength.square().clamp_min(1e-30)
        assert deviation[a.strength > 0].max() < 6 * math.sqrt(2 / 63)
    with pytest.raises(NodeError, match="projections must be a whole number from 1"):
        effective_points(model, image, node, projections=0)


# ---- known answers


def ramp(height: int, width: int) -> torch.Tensor:
    """An image of one color, with slopes of 3 along x and 4 along y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (3 * x + 4 * y)[None].double()


@pytest.mark.parametrize("modulated", [False, True])
def test_a_deformable_convolution_on_a_ramp(modulated):
    """Moving a point changes its sample by the slope, of length 5, times its weight, times its mask of one half."""
    kind = ModulatedDeformConv2d if modulated else DeformConv2d
    toy = nn.Sequential(kind(1, 1, 3, padding=1)).double()
    points = effective_points(toy, ramp(8, 9), Position("0", x=4, y=3))
    (layer,) = points.layers
    expected = 5 * toy[0].weight.detach().abs().view(9) * (0.5 if modulated else 1)
    assert (layer.strength[3, 4, 0] - expected).abs().max() < 1e-13
    assert layer.locations[3, 4, 0].tolist() == [[x, y] for y in (2, 3, 4) for x in (3, 4, 5)]
    assert layer.strength.count_nonzero() == 9 and layer.deformable


def test_strides_and_offset_scale_on_a_ramp():
    """Behind a mean over 2 x 2 pixels the slope in image pixels is the same, and so is the strength."""

    class Pool(nn.Module):
        def forward(self, x):
            return nn.functional.avg_pool2d(x, 2).permute(0, 2, 3, 1)

    toy = nn.Sequential(Pool(), DCNv3(1, groups=1, offset_scale=0.4)).double()
    nn.init.constant_(toy[1].input_proj.weight, 2)
    nn.init.constant_(toy[1].output_proj.weight, 7)
    (layer,) = effective_points(toy, ramp(16, 20), Position("1", x=4, y=3)).layers
    assert (layer.strength[3, 4, 0] - 5 * 2 * 7 / 9).abs().max() < 1e-12
    offsets = torch.tensor([[x, y] for x in (-1, 0, 1) for y in (-1, 0, 1)]).double() * 0.8  # column by column
    assert (layer.locations[3, 4, 0] - (torch.tensor([8.5, 6.5]) + offsets)).abs().max() < 1e-12


def test_plain_convolutions_as_deformable_ones():
    """A ResNet's own 3x3 convolutions; the derivative at a pixel's center is that to the right and downwards."""
    plain, image = views.model("resnet18", channels=(8, 16, 24, 32), layers=(1, 1, 1, 1)), views.image(64, 64)
    with torch.no_grad():
        before = plain(image[None])
    points = effective_points(plain, image, Logit(1), plain=True)
    names = [f"layer{i}.0.conv{k}" for i in (1, 2, 3, 4) for k in (1, 2)]
    assert [layer.layer for layer in points.layers] == names
    assert not any(layer.deformable for layer in points.layers)
    with torch.no_grad():
        assert torch.equal(plain(image[None]), before)

    # the same network with deformable layers that begin at zero offsets
    torch.manual_seed(0)
    deformable = timm.create_model("resnet18", num_classes=3, channels=(8, 16, 24, 32), layers=(1, 1, 1, 1))
    deformable = deformable.double().eval()
    deformable.load_state_dict(plain.state_dict())
    deform_convolutions(deformable, (1, 2, 3, 4), modulated=False)
    moving = effective_points(deformable, image, Logit(1))
    for a, b in zip(points.layers, moving.layers):
        assert torch.equal(a.locations, b.locations) and b.deformable
        assert (a.strength - b.strength).abs().max() < 1e-10 * b.strength.max()
    # a difference to one side misses half the step times the second derivative, which is below 1e3 times the first
    check(deformable, image, Logit(1), moving, 1, step=1e-7, tolerance=1e-4, central=False)
    mixed = effective_points(views.model("small resnet"), image, Logit(1), plain=True)
    assert [layer.deformable for layer in mixed.layers] == [False] * 2 + [True] * 6
    # not the depthwise convolutions inside DCNv3
    atto = effective_points(views.model("internimage_atto"), image, Logit(1), plain=True)
    assert all(layer.deformable for layer in atto.layers) and len(atto.layers) == 6


def test_the_share_of_strength_over_that_of_points():
    locations = torch.tensor([[1.0, 1.0], [1.4, 0.6], [5.0, 5.0], [-3.0, 1.0]]).view(1, 1, 1, 4, 2).double()
    layer = LayerPoints("a layer", locations, torch.tensor([3.0, 1.0, 4.0, 0.0]).view(1, 1, 1, 4).double(), True)
    assert layer.concentration((1, 1, 2, 2), 8, 8) == pytest.approx(0.5 / 0.5)
    assert layer.concentration((4, 4, 8, 8), 8, 8) == pytest.approx(0.5 / 0.25)
    assert math.isnan(layer.concentration((3, 0, 4, 1), 8, 8))
    broken = LayerPoints("a layer", locations * float("nan"), layer.strength, True)
    assert math.isnan(broken.concentration((0, 0, 8, 8), 8, 8))


# ---- bad input


def test_models_and_nodes_without_such_layers():
    image = views.image()
    for name in ("resnet18", "vit_tiny_patch16_224"):
        model = timm.create_model(name, num_classes=3)
        with pytest.raises(UserError, match="has no deformable layers .* so there is no view of") as caught:
            effective_points(model, image, Logit(0))
        message = str(caught.value)
        assert message.endswith("those of the receptive field and of the saliency region work") and "\n" not in message
    with pytest.raises(UserError, match="has no deformable layers and no plain 3x3 convolutions"):
        effective_points(model, image, Logit(0), plain=True)
    atto = views.model("internimage_atto")
    with pytest.raises(NodeError, match="no deformable layer comes before the node 'patch_embed at column 4, row 4'"):
        effective_points(atto, image, Position("patch_embed"))
    with torch.no_grad():
        atto.levels[0].blocks[0].dcn.mask.bias[0] = float("nan")
    with pytest.raises(NotFiniteView, match="dcn.mask.bias"):
        effective_points(atto, image, Logit(0))
