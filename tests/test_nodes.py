# SPDX-License-Identifier: MIT
"""Nodes: which numbers of a model they are, where they lie in the image, and names and positions that are not there."""

import pytest
import timm
import torch
import views
from torch import nn

from internimage.analysis import (
    Logit,
    NodeError,
    NotFiniteView,
    Pooled,
    Position,
    effective_dilation,
    effective_points,
    effective_receptive_field,
    map_of,
    saliency_region,
)
from internimage.analysis.inspection import inspected
from internimage.analysis.nodes import Node
from internimage.models.parts import stage_maps

VIEWS = [effective_receptive_field, effective_points, saliency_region]


@pytest.fixture(scope="module")
def atto():
    return views.model("internimage_atto")


def values(model: nn.Module, image: torch.Tensor, node: Node, grad: bool = True) -> torch.Tensor:
    opened = node.open(model)
    with inspected(model, image) as batch, torch.set_grad_enabled(grad):
        return opened.values(batch.requires_grad_(grad)).detach()[0]


# ---- which numbers


def test_stages_of_models_by_their_number():
    names = {
        "internimage_atto": [f"levels.{i}" for i in range(4)],
        "dcnv2_resnet18": [f"layer{i}" for i in range(1, 5)],
        "resnet18": [f"layer{i}" for i in range(1, 5)],
        "convnext_atto": [f"stages.{i}" for i in range(4)],
        "mobilenetv3_small_050": [f"blocks.{i}" for i in (0, 1, 3, 5)],  # without bn1, which belongs to the stem
        "vit_tiny_patch16_224": [f"blocks.{i}" for i in range(12)],
    }
    for name, stages in names.items():
        with torch.device("meta"):
            assert [stage for _, stage in stage_maps(timm.create_model(name))][: len(stages)] == stages, name
    assert stage_maps(nn.Linear(1, 1)) == []


@pytest.mark.parametrize("name", ["internimage_atto", "dcnv2_resnet18", "convnext_atto"])
def test_nodes_are_the_numbers_that_the_model_computes(name):
    model, image = views.model(name), views.image(64, 96)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image[None])
        logits = model(image[None])[0]
        pooled = model.forward_head(model.forward_features(image[None]), pre_logits=True)[0]
    stage3 = maps[-2][0]
    assert stage3.shape[1:] == (4, 6)
    expected = {
        Position(3, x=5, y=1): stage3[:, 1, 5],
        Position(stage_maps(model)[2][1], x=5, y=1): stage3[:, 1, 5],
        Position(3): stage3[:, 2, 3],
        Position(3, x=0, y=3, channel=7): stage3[7:8, 3, 0],
        Position(): maps[-1][0, :, 1, 1],
        Logit(2): logits[2:],
        Logit(): logits.max()[None],
        Pooled(): pooled,
    }
    for node, numbers in expected.items():
        for grad in (True, False):  # with and without the fast paths of inference, whose sums are the same
            torch.testing.assert_close(values(model, image, node, grad), numbers, rtol=1e-9, atol=1e-12)


def test_a_layer_of_internimage_is_channels_last_and_a_convolution_is_not(atto):
    """Sizes of layers of which the formats differ; the map of stage 1 has as many channels as rows and columns."""
    image = views.image(64, 64)
    for layer in ("levels.0", "levels.0.blocks.0", "levels.0.blocks.0.dcn", "levels.0.blocks.0.mlp", "patch_embed"):
        found = map_of(atto, image, layer)
        assert (found.channels, found.height, found.width, found.stride) == (16, 16, 16, (4, 4)), layer
    hidden = map_of(atto, image, "levels.0.blocks.0.mlp.fc1")
    assert (hidden.channels, hidden.height, hidden.width) == (64, 16, 16)
    stem = map_of(atto, views.image(64, 32), "patch_embed.conv1")
    assert (stem.channels, stem.height, stem.width) == (8, 32, 16)

    seen = []
    handle = atto.get_submodule("levels.0.blocks.0.dcn").register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        atto(image[None])
    handle.remove()
    found = values(atto, image, Position("levels.0.blocks.0.dcn", x=3, y=9))
    torch.testing.assert_close(found, seen[0][0, 9, 3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["internimage_atto", "small resnet"])
def test_every_module_has_a_map_or_a_named_error_with_and_without_fast_paths(name):
    model, image = views.model(name), views.image(32, 48)
    found = 0
    for layer in dict(model.named_modules()):
        node, errors = Position(layer, x=0, y=0), []
        results = []
        for grad in (True, False):
            try:
                results.append(values(model, image, node, grad))
            except NodeError as error:
                errors.append(str(error))
        assert len(errors) in (0, 2), layer
        if not errors:
            found += 1
            torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
        else:
            assert "gives no map" in errors[0] or "is not called" in errors[0] or layer == "", errors[0]
    assert found > 40


def test_a_layout_that_cannot_be_told():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            if x.shape[2:] != (4, 4):
                raise ValueError("takes 4 x 4 pixels")
            return self.inner(x.expand(-1, 4, -1, -1))

    with pytest.raises(NodeError, match="the layout of the map of 'inner', 4 x 4 x 4, cannot be told: name a stage"):
        map_of(Square(), torch.zeros(1, 4, 4), "inner")


def test_classes_by_name(atto):
    named = timm.create_model("internimage_atto", num_classes=3).double()
    named.pretrained_cfg = {**named.pretrained_cfg, "label_names": ["cat, house cat", "dog", "7"]}
    image = views.image()
    with torch.no_grad():
        logits = named.eval()(image[None])[0]
    for label, index in (("Cat", 0), ("cat, house cat", 0), (" dog", 1), ("7", 2), ("1", 1), (2, 2)):
        assert values(named, image, Logit(label)) == pytest.approx(logits[index, None], rel=1e-9)
    node = Logit("dog").open(named)
    assert node.text() == "logit of class 1 (dog)"
    imagenet = timm.create_model("internimage_atto", num_classes=1000, device="meta")
    assert Logit("tench").open(imagenet).text() == "logit of class 0 (tench, Tinca tinca)"
    with pytest.raises(NodeError, match="has no class 'goldfsh'; near ones are goldfish"):
        Logit("goldfsh").open(imagenet)


# ---- positions and pixels


def test_pixels_and_positions(atto):
    found = map_of(atto, views.image(32, 64), 3)
    assert found.stride == (16, 16) and (found.height, found.width) == (2, 4)
    assert found.to_image(0, 0) == (7.5, 7.5) and found.to_image(3, 1) == (55.5, 23.5)
    assert [found.from_image(x, 20) for x in (0, 15, 16, 63)] == [(0, 1), (0, 1), (1, 1), (3, 1)]
    for x in range(4):
        assert found.from_image(*found.to_image(x, 1)) == (x, 1)
    for pixel in ((64, 0), (0, 32), (-1, 0), (float("nan"), 0)):
        with pytest.raises(NodeError, match="a pixel must be inside the image of 64 x 32 pixels, got"):
            found.from_image(*pixel)
    odd = map_of(atto, views.image(33, 50), 4)  # rounded up by every strided convolution
    assert (odd.height, odd.width) == (2, 2) and odd.stride == (25, 16.5)
    assert odd.from_image(49, 32) == (1, 1)


# ---- what a view leaves behind


def _state(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [getattr(module, "grad_checkpointing", None) for module in model.modules()],
    )


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_leaves_the_model_as_it_is(view):
    model = views.model("internimage_atto").train()
    model.levels[1].eval()
    model.set_grad_checkpointing()
    model.head.weight.requires_grad_(False)
    before, image = _state(model), views.image()
    whole = image.clone()
    view(model, image, Position(3))
    assert _state(model) == before
    with pytest.raises(NodeError):
        view(model, image, Position(3, x=9))
    assert _state(model) == before and torch.equal(image, whole) and not image.requires_grad


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_under_inference_mode_and_with_recomputing_is_the_same(view):
    model, image = views.model("internimage_atto"), views.image()
    expected = _arrays(view(model, image, Pooled()))
    model.set_grad_checkpointing()
    with torch.no_grad():
        model(image[None])  # the fast path keeps blocks for later
    with torch.inference_mode():
        again = _arrays(view(model, image.clone(), Pooled()))
    for a, b in zip(again, expected):
        assert torch.equal(a, b)
    calls = []
    model.levels[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    effective_receptive_field(model, image, Pooled(), projections=2)
    assert len(calls) == 1  # and not again in each backward pass


def _arrays(result) -> list[torch.Tensor]:
    parts = getattr(result, "layers", (result,))
    return [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]


# ---- bad input


BAD_NODES = [
    (Position("levels.2.blocks.0.dcm"), r"has no layer 'levels.2.blocks.0.dcm'; near ones are levels.2.blocks.0.dcn"),
    (Position(""), "has no layer ''; near ones are levels.0, levels.1, levels.2, levels.3"),
    (Position(5), "has stages 1 to 4, got 5"),
    (Position(0), "has stages 1 to 4, got 0"),
    (Position(True), "layer must be the name of a module or the number of a stage, got True"),
    (Position(2.0), "layer must be the name of a module or the number of a stage, got 2.0"),
    (Position(3, x=2), r"map of 'levels.2' has columns x 0 to 1 and rows y 0 to 1 for this image, got \(2, 1\)"),
    (Position(3, x=0, y=7), r"has columns x 0 to 1 and rows y 0 to 1 for this image, got \(0, 7\)"),
    (Position(3, x=-1), "x must be a whole number from 0, got -1"),
    (Position(3, y=0.5), "y must be a whole number from 0, got 0.5"),
    (Position(3, channel=64), "has channels 0 to 63, got 64"),
    (Position("head"), "'head' of 'internimage_atto' gives no map, but a shape"),
    (Position("levels.3.downsample.x"), "has no layer"),
    (Position("levels"), "'levels' of 'internimage_atto' is not called in a forward pass"),
    (Logit(3), "has classes 0 to 2, got 3"),
    (Logit(-1), "the index of a class must be a whole number from 0, got -1"),
    (Logit("3"), "has classes 0 to 2, got 3"),
    (Logit("cat"), "has no class 'cat'; near ones are 0, 1, 2"),
]


@pytest.mark.parametrize(("node", "message"), BAD_NODES, ids=lambda value: str(value)[:40])
def test_nodes_that_are_not_there(atto, node, message):
    for view in VIEWS:
        with pytest.raises(NodeError, match=message) as caught:
            view(atto, views.image(), node)
        assert "\n" not in str(caught.value)


def test_models_without_the_node():
    image = views.image()
    bare = timm.create_model("internimage_atto", num_classes=0)
    with pytest.raises(NodeError, match="'internimage_atto' has no classes"):
        effective_receptive_field(bare, image, Logit(0))
    toy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(NodeError, match=r"'Sequential' has no stages \(timm's feature_info\): name a layer"):
        effective_receptive_field(toy, image, Position())
    with pytest.raises(NodeError, match="'Sequential' has no pooled feature"):
        effective_receptive_field(toy, image, Pooled())
    with pytest.raises(NodeError, match=r"'Sequential' gives no logits \(N, classes\), but \(1, 4, 30, 30\)"):
        effective_receptive_field(toy, image, Logit(0))
    assert effective_receptive_field(toy, image, Position("0")).sensitivity.count_nonzero() == 9


@pytest.mark.parametrize("view", VIEWS)
def test_images_that_are_none(atto, view):
    for wrong, message in (
        (torch.zeros(2, 3, 32, 32), r"image must be one image, \(C, H, W\) or \(1, C, H, W\), got \(2, 3, 32, 32\)"),
        (torch.zeros(32, 32), r"got \(32, 32\)"),
        (torch.zeros(3, 0, 32), r"got \(3, 0, 32\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "image must be a floating-point tensor .* got torch.uint8"),
        (None, "image must be a floating-point tensor .* got NoneType"),
        (torch.zeros(1, 32, 32), "'internimage_atto' takes images of 3 channels, got 1"),
    ):
        with pytest.raises(NodeError, match=message):
            view(atto, wrong, Position(3))


def test_an_image_of_a_size_that_the_model_does_not_take():
    huge = timm.create_model("internimage_huge", device="meta")
    with pytest.raises(NodeError, match=r"takes image sides of which ceil\(side / 16\) is even, got 48 x 48"):
        effective_receptive_field(huge, torch.zeros(3, 48, 48), Position(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said(value):
    """Offsets of NaN would go unnoticed: such points contribute nothing."""
    image, wrong = views.image(), views.image()
    wrong[1, 4, 5] = value
    for view in [*VIEWS, lambda model, image, node: effective_dilation(model, image)]:
        model = views.model("internimage_atto")
        with pytest.raises(NotFiniteView, match="the image has NaN or infinity"):
            view(model, wrong, Position(3))
        with torch.no_grad():
            model.levels[0].blocks[0].dcn.offset.weight[0, 0] = value
        with pytest.raises(NotFiniteView, match=r"NaN or infinity \(levels.0.blocks.0.dcn.offset.weight\)"):
            view(model, image, Position(3))


def test_what_overflows_is_said():
    toy = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)).half()
    nn.init.constant_(toy[0].weight, 3e4)
    nn.init.constant_(toy[1].weight, 3e4)
    for view in (effective_receptive_field, saliency_region):
        with pytest.raises(NotFiniteView, match="is not finite, though image and weights are: float16 overflows, take"):
            view(toy, torch.ones(1, 8, 8), Position("1"))
