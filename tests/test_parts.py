# SPDX-License-Identifier: MIT
"""Parts of models, ours and timm's: frozen, sharded, trained at a rate of their own, drawn, or refused by name."""

from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

import internimage  # noqa: F401  (registers the models)
from internimage.analysis.points import sampled_points
from internimage.config import ConfigError
from internimage.engine.freeze import frozen_parts
from internimage.engine.parallel import shard
from internimage.engine.world import World
from internimage.layers.sampling import SamplingLayer
from internimage.models import parts
from internimage.models.parts import NoSuchParts


def create(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def names_of(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]


# ---- freezing

FROZEN = {
    "internimage_atto": [["patch_embed"], ["levels.0"], ["levels.1"], ["levels.2"], ["levels.3"]],
    "internimage_huge": [["patch_embed"], ["levels.0"], ["levels.1"], ["levels.2"], ["levels.3"]],
    "resnet18": [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]],
    "convnext_atto": [["stem"], ["stages.0"], ["stages.1"], ["stages.2"], ["stages.3"]],
    "swin_tiny_patch4_window7_224": [["patch_embed"], ["layers.0"], ["layers.1"], ["layers.2"], ["layers.3"]],
    # two of its seven groups of blocks work at stride 16, and two at 32
    "efficientnet_b0": [["conv_stem", "bn1"], ["blocks.0"], ["blocks.1"], ["blocks.2"], ["blocks.3", "blocks.4"]],
    # the last stage is not among timm's feature maps, which are behind the final norm
    "densenet121": [
        ["features.conv0", "features.norm0"],
        *([f"features.denseblock{i}", f"features.transition{i}"] for i in (1, 2, 3)),
        ["features.denseblock4"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("freeze", [1, 2, 3, 4])
def test_stem_and_stages_are_frozen(freeze, name):
    model = create(name)
    expected = [part for group in FROZEN[name][: freeze + 1] for part in group]
    assert names_of(model, frozen_parts(model, freeze)) == expected


@pytest.mark.parametrize("name", ["internimage_atto", "resnet18", "vit_tiny_patch16_224"])
def test_all_but_the_classifier_is_frozen(name):
    model = create(name)
    frozen = {id(p) for part in frozen_parts(model, 5) for p in part.parameters()}
    left = {key for key, parameter in model.named_parameters() if id(parameter) not in frozen}
    classifier = "fc" if name == "resnet18" else "head"
    assert {f"{classifier}.weight", f"{classifier}.bias"} <= left
    assert all("." not in key or key.startswith(classifier) for key in left)  # a ViT's tokens are in no module
    assert frozen_parts(model, 0) == []


@pytest.mark.parametrize(
    ("name", "freeze", "reason"),
    [
        ("vit_tiny_patch16_224", 1, "'vit_tiny_patch16_224' has no stages of several resolutions; 5 works"),
        ("pit_ti_224", 2, "'pit_ti_224' does not group its parameters into layers"),
        ("rdnet_tiny", 1, "'rdnet_tiny' does not group its parameters into layers"),  # timm raises AssertionError
        ("hiera_tiny_224", 1, "'hiera_tiny_224' cannot be split into stages: 'pos_embed' is in no module of one"),
        ("levit_128s", 4, "'freeze' cannot be 4: 'levit_128s' has 3 stages"),
    ],
)
def test_freezing_is_refused_by_name(name, freeze, reason):
    with pytest.raises(ConfigError, match=reason):
        frozen_parts(create(name), freeze)
    with pytest.raises(ConfigError, match="'Linear' does not group its parameters into layers"):
        frozen_parts(nn.Linear(2, 2), freeze)


# ---- sharding


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank=0, size=1, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("internimage_atto", ["levels.0.blocks.0", "levels.1.blocks.0", "levels.2.blocks.0"], 6),
        ("resnet18", ["layer1.0", "layer1.1", "layer2.0"], 8),
        ("convnext_atto", ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.downsample"], 15),
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.1", "blocks.2"], 12),
    ],
)
def test_blocks_are_sharded_one_by_one(name, first, count, world):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0).eval()
    assert names_of(model, parts.repeated_blocks(model))[:3] == first
    images = torch.randn(2, 3, *((224, 224) if name.startswith("vit") else (64, 64)))
    with torch.no_grad():
        expected = model(images)
    sharded = shard(model, world, torch.float32)
    units = [key for key, module in sharded.named_modules() if isinstance(module, FSDPModule)]
    assert len(units) == count + 1 and units[0] == "" and set(first) < set(units)
    logits = sharded(images)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            partial(create, "pit_ti_224"),
            "'parallel' cannot be fsdp: 'pit_ti_224' does not group its parameters into layers",
        ),
        (partial(nn.Linear, 2, 2), "'Linear' does not group its parameters into layers"),
    ],
)
def test_a_model_is_never_sharded_as_one_piece(build, reason, world):
    with pytest.raises(ConfigError, match=reason):
        shard(build(), world, torch.float32)


def test_one_block_is_not_many():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.head = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)

        def group_matcher(self, coarse=False):
            return dict(stem="^stem", blocks=r"^blocks\.(\d+)")

    with pytest.raises(NoSuchParts, match="'Single' has no repeated blocks"):
        parts.repeated_blocks(Single())


# ---- layers that sample


class Shifted(nn.Module):
    """A layer of another kind, channels first: each pixel reads the one to its right."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x.roll(-1, 3)

    def input_size(self, x):
        return x.shape[2], x.shape[3]

    def offset_parameters(self):
        return [self.offset]

    def sampling(self, x):
        rows, columns = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        places = torch.stack([columns + 1, rows], -1).float()
        return places.expand(x.shape[0], -1, -1, -1)[:, :, :, None, None], torch.ones(*x.shape[:1], *x.shape[2:], 1, 1)


def test_layers_of_any_kind_are_drawn_and_have_offsets():
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), Shifted())
    assert isinstance(model[1], SamplingLayer) and list(parts.sampling_layers(model)) == ["1"]
    assert parts.offset_parameters(model) == [model[1].offset]
    layer, places, weights = sampled_points(model, torch.zeros(1, 3, 8, 12))
    assert layer == "1" and places.shape == (1, 4, 6, 1, 1, 2) and weights.shape == (1, 4, 6, 1, 1)
    assert places[0, 0, 0, 0, 0].tolist() == [2.5, 0.5]  # the middle of the second pair of pixels


def test_layers_of_a_stage():
    model = create("internimage_tiny")
    assert parts.sampling_layers_of_stage(model, 2) == [f"levels.1.blocks.{i}.dcn" for i in range(4)]
    assert parts.sampling_layers_of_stage(model, 5) == []
    assert parts.sampling_layers_of_stage(create("resnet18"), 1) == []
    assert parts.sampling_layers_of_stage(create("vit_tiny_patch16_224"), 1) == []


@pytest.mark.parametrize(("name", "a_block"), [("internimage_atto", 2), ("internimage_huge", 4)])
def test_offset_parameters(name, a_block):
    model = create(name)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = [names[id(parameter)] for parameter in parts.offset_parameters(model)]
    assert len(found) == len(set(found)) == a_block * len(model.get_blocks())
    assert all(".dcn.offset." in key or ".dcn.center_feature_scale_proj_" in key for key in found)
    with pytest.raises(NoSuchParts, match="'resnet18' has no layers that sample at learned offsets"):
        parts.offset_parameters(create("resnet18"))


# ---- images


def test_image_sizes():
    assert parts.check_image_size(create("internimage_tiny"), 33, 47)
    giant = create("internimage_giant")
    assert parts.check_image_size(giant, 64, 96)
    with pytest.raises(ValueError, match=r"got 48 x 64; multiples of 32 always fit, the next are 64 x 64"):
        parts.check_image_size(giant, 48, 64)
    giant.reset_classifier(0)
    giant.prune_intermediate_layers(1, prune_norm=True)
    assert parts.check_image_size(giant, 48, 64)  # nothing joins the stages any more
    assert not parts.check_image_size(create("resnet18"), 1, 1)  # it does not know
