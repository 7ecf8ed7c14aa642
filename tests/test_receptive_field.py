# SPDX-License-Identifier: MIT
"""The receptive field against the Jacobian by torch.func, and on networks whose answer is known."""

import math

import pytest
import torch
import views
from torch import nn

from internimage.analysis import Logit, NodeError, Pooled, Position, ReceptiveField, effective_receptive_field
from internimage.analysis.projections import directions

# with other sums than autograd's: the derivatives of some dozen layers in float64, relative to the largest
ROUNDING = 1e-10


def jacobian(model, image, node) -> torch.Tensor:
    """d node / d image, (D, 3, H, W), through the model's own methods."""

    def value(x):
        if isinstance(node, Pooled):
            return model.forward_head(model.forward_features(x[None]), pre_logits=True)[0]
        if isinstance(node, Logit):
            return model(x[None])[0, node.label, None]
        maps = model.forward_intermediates(x[None], intermediates_only=True)
        vector = maps[node.layer][0, :, node.y, node.x]  # indices of a ResNet begin with the stem
        return vector if node.channel is None else vector[node.channel, None]

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return torch.func.jacrev(value)(image)


CASES = [
    ("internimage_atto", {}, [Position("levels.2", 1, 0), Position("levels.2", 0, 1, 5), Pooled(), Logit(1)]),
    ("internimage_atto", dict(views.HUGE, offset_scale=0.7), [Position("levels.2", 1, 1), Pooled()]),
    ("small resnet", {}, [Position("layer3", 0, 1), Logit(2)]),
    ("convnext_atto", {}, [Position("stages.1", 1, 2, 3), Logit(0)]),
]


@pytest.mark.parametrize(("name", "arguments", "nodes"), CASES, ids=["atto", "as huge", "resnet", "convnext"])
def test_the_exact_field_is_the_norm_of_the_jacobian(name, arguments, nodes):
    model, image = views.model(name, **arguments), views.image()
    for node in nodes:
        indexed = node
        if isinstance(node, Position):
            index = {"levels.2": 2, "layer3": 3, "stages.1": 1}[node.layer]
            indexed = Position(index, node.x, node.y, node.channel)
        expected = jacobian(model, image, indexed).square().sum((0, 1)).sqrt()
        found = effective_receptive_field(model, image, node, projections=None)
        assert found.projections is None and found.sensitivity.dtype == torch.float64
        deviation = (found.sensitivity - expected).abs().max() / expected.max()
        assert expected.max() > 0 and deviation < ROUNDING, node


def test_projections_are_those_of_the_jacobian():
    model, image = views.model("internimage_atto"), views.image()
    jacobians = jacobian(model, image, Position(2, 1, 0)).flatten(1)
    for projections, seed in ((1, 0), (8, 0), (8, 3)):
        found = effective_receptive_field(model, image, Position(3, 1, 0), projections, seed)
        rows, factor = directions(64, projections, seed)
        assert rows.shape == (projections, 64) and set(rows.flatten().tolist()) == {-1.0, 1.0}
        expected = ((rows.double() @ jacobians).square().sum(0) / projections).view(3, 32, 32).sum(0).sqrt()
        assert found.projections == projections and factor == 1 / projections
        assert (found.sensitivity - expected).abs().max() / expected.max() < ROUNDING
    other = effective_receptive_field(model, image, Position(3, 1, 0), 8, seed=4)
    same = effective_receptive_field(model, image, Position(3, 1, 0), 8, seed=3)
    assert torch.equal(same.sensitivity, found.sensitivity) and not torch.equal(other.sensitivity, found.sensitivity)
    # as many passes as channels are all of them
    assert effective_receptive_field(model, image, Position(1, 1, 0), 16).projections is None


def test_the_mean_over_signs_is_the_square_of_the_norm():
    """The variance of (v^T a)^2 is below 2 |a|^4: of the mean of 4000, the deviation is below sqrt(2 / 4000) = 2.3 %;
    six of these at each of 200 columns are exceeded with a probability below 1e-6."""
    columns = torch.randn(64, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = sum(
        (directions(64, 8, seed)[0].double() @ columns).square().sum(0) * directions(64, 8, seed)[1]
        for seed in range(500)
    )
    expected = columns.square().sum(0)
    assert ((squares / 500 - expected).abs() / expected).max() < 6 * math.sqrt(2 / 4000)


def test_behind_a_layer_norm_the_sum_of_channels_has_no_gradient_and_the_field_has():
    model, image = views.model("internimage_atto"), views.image()
    jacobians = jacobian(model, image, Position(2, 1, 0))
    model_sum = jacobians.sum(0).square().sum(0).sqrt()
    found = effective_receptive_field(model, image, Position(3, 1, 0))
    assert found.sensitivity.max() > 1e6 * model_sum.max()


# ---- known answers


def test_a_convolution_of_known_weights():
    toy = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)).double()
    found = effective_receptive_field(toy, torch.randn(2, 6, 7).double(), Position("0", x=4, y=2), projections=None)
    expected = torch.zeros(6, 7, dtype=torch.float64)
    expected[1:4, 3:6] = toy[0].weight.detach().square().sum((0, 1)).sqrt()
    assert (found.sensitivity - expected).abs().max() < 1e-14  # sums of some numbers below 1
    assert found.center == (4, 2) and found.node == "0 at column 4, row 2"
    corner = effective_receptive_field(toy, torch.randn(2, 6, 7).double(), Position("0", x=0, y=0, channel=1))
    expected = toy[0].weight.detach()[1, :, 1:, 1:].square().sum(0).sqrt()
    assert (corner.sensitivity[:2, :2] - expected).abs().max() < 1e-14
    assert corner.sensitivity.count_nonzero() == 4 and corner.projections is None


def field(sensitivity: torch.Tensor, center: tuple[float, float]) -> ReceptiveField:
    return ReceptiveField(sensitivity.double(), "a node", center, None)


def test_the_share_of_an_area_over_its_size():
    sensitivity = torch.ones(4, 8)
    sensitivity[0, 0] = 3  # energy 9 of 40
    found = field(sensitivity, (0, 0))
    assert found.concentration((0, 0, 1, 1)) == pytest.approx(9 / 40 * 32)
    assert found.concentration((0, 0, 2, 4)) == pytest.approx(16 / 40 * 4)
    assert found.concentration((-5, -5, 100, 100)) == pytest.approx(1)
    assert found.concentration((0.6, 0, 1.6, 4)) == pytest.approx(4 / 40 * 8)  # the pixels whose centers are inside
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :2] = True
    assert found.concentration(mask) == found.concentration(mask.numpy()) == pytest.approx(10 / 40 * 16)
    assert math.isnan(field(torch.zeros(4, 8), (0, 0)).concentration(mask))
    assert math.isnan(field(torch.zeros(4, 8), (0, 0)).square_side(0.5))
    for area, message in (
        (mask.T, r"a mask must have the size of the image, 4 x 8, got \(8, 4\)"),
        (torch.zeros(4, 8), "an area must have pixels of the image of 8 x 4 pixels, got an empty one"),
        ((9, 0, 12, 4), "an area must have pixels of the image"),
        ((3, 0, 3, 4), "an area must have pixels of the image"),
        ((0, 0, 1), r"an area must be a mask \(H, W\) or a box of 4 numbers, got a shape \(3,\)"),
    ):
        with pytest.raises(NodeError, match=message):
            found.concentration(area)


def test_the_side_of_a_square():
    sensitivity = torch.zeros(9, 9)
    sensitivity[4, 4], sensitivity[4, 6], sensitivity[0, 0] = 1, 1, math.sqrt(2)  # energies 1, 1, 2
    found = field(sensitivity, (4, 4))
    assert [found.square_side(share) for share in (0.2, 0.25, 0.26, 0.5, 0.51, 0.99)] == [1, 1, 5, 5, 9, 9]
    between = field(torch.ones(4, 4), (1.5, 1.5))  # four pixels around the center
    assert [between.square_side(share) for share in (0.25, 0.26, 1)] == [2, 4, 4]
    for share in (0, -1, 1.1, float("nan")):
        with pytest.raises(NodeError, match="share must be above 0 and at most 1, got"):
            found.square_side(share)


# ---- arguments


def test_arguments_and_progress():
    model, image = views.model("internimage_atto"), views.image()
    for wrong in (0, -1, 1.5, True, "8"):
        with pytest.raises(NodeError, match="projections must be a whole number from 1, or None for all channels, got"):
            effective_receptive_field(model, image, Position(3), projections=wrong)
    seen = []
    effective_receptive_field(model, image[None], Position(3), 3, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    middle = effective_receptive_field(model, views.image(32, 64), Pooled(), 1)
    assert middle.center == (31.5, 15.5) and middle.sensitivity.shape == (32, 64)


def test_a_node_that_no_pixel_reaches_is_zero():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4, dtype=x.dtype)

    found = effective_receptive_field(Constant(), torch.zeros(1, 4, 4), Logit(2))
    assert not found.sensitivity.any() and found.node == "logit of class 2"
