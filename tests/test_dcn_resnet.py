# SPDX-License-Identifier: MIT
"""ResNets with deformable convolutions: what they start from, which files they load, and that they learn."""

import copy

import pytest
import timm
import torch
from conftest import assert_close
from safetensors.torch import save_file
from torch import Tensor, nn

import internimage
from internimage import CheckpointError
from internimage.analysis.points import sampled_points
from internimage.engine.config import RunConfig
from internimage.engine.create import ModelError, create_model
from internimage.engine.freeze import frozen_parts
from internimage.engine.optimizer import create_optimizer
from internimage.layers import DeformConv2d, ModulatedDeformConv2d
from internimage.layers.deform_conv import DeformConv
from internimage.models import DCNResNet, DeformError, deform_convolutions
from internimage.models.families import families
from internimage.models.parts import offset_parameters, repeated_blocks, sampling_layers, stem_and_stages

# name -> 3x3 convolutions that deform, their version, and the channels of what predicts their offsets (and masks)
NAMES = {
    "dcnv1_resnet50": (3, DeformConv2d, 72),
    "dcnv1_resnet101": (3, DeformConv2d, 72),
    "dcnv2_resnet18": (12, ModulatedDeformConv2d, 27),
    "dcnv2_resnet50": (13, ModulatedDeformConv2d, 27),
    "dcnv2_resnet101": (30, ModulatedDeformConv2d, 27),
}
# of the same kinds of blocks, in a hundredth of the time
SMALL = dict(channels=(8, 16, 32, 64), num_classes=10)
# Converted models do the same float32 arithmetic in another order: each layer rounds anew, by 6e-8 of its values.
EQUAL = 1e-5


def randomized(model: nn.Module) -> nn.Module:
    """A model in which every parameter and every statistic of batch norm matters, in eval mode."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.dim() == 1:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def plain(name: str = "resnet18", **arguments) -> nn.Module:
    return randomized(timm.create_model(name.split("_", 1)[-1] if name.startswith("dcnv") else name, **arguments))


def create(name: str, path, **arguments) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **arguments).eval()


def saved(path, state_dict: dict[str, Tensor]):
    torch.save(state_dict, path)
    return path


def trained(name: str, **arguments) -> DCNResNet:
    """A model whose offsets are not zero."""
    model = randomized(timm.create_model(name, **arguments))
    for parameter in offset_parameters(model):
        nn.init.normal_(parameter, std=0.02)
    return model


def deformable(model: nn.Module) -> dict[str, DeformConv]:
    return {key: module for key, module in model.named_modules() if isinstance(module, DeformConv)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


# ---- names


def test_names():
    (family,) = [family for family in families() if family.name == "deformable ResNet"]
    assert family.architectures == list(NAMES) == [n for n in internimage.list_models() if n.startswith("dcnv")][:5]
    assert "dcnv2_resnet50.a1_in1k" in internimage.list_models(pretrained=True)
    for name, (count, version, channels) in NAMES.items():
        model = timm.create_model(name, device="meta")
        layers = deformable(model)
        assert isinstance(model, DCNResNet) and len(layers) == count
        assert {type(layer) for layer in layers.values()} == {version}
        assert {layer.conv_offset.weight.shape[0] for layer in layers.values()} == {channels}
        assert all(layer.kernel_size == (3, 3) and layer.bias is None for layer in layers.values())
        state_dict = timm.create_model(name.split("_")[1], device="meta").state_dict()
        rest = {key for key in model.state_dict() if ".conv_offset." not in key}
        assert rest == set(state_dict)


@pytest.mark.parametrize("name", [f"{name}.{tag}" for name in NAMES for tag in ("", "tv_in1k")])
def test_cfgs_are_those_of_the_plain_weights(name):
    name = name.removesuffix(".")
    cfg, start = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(name.split("_", 1)[1])
    assert cfg.hf_hub_id == start.hf_hub_id == f"timm/{start.architecture}.{start.tag}"
    assert cfg.tag == start.tag and not cfg.url  # which would be tried before the repository
    for field in ("license", "mean", "std", "input_size", "crop_pct", "interpolation", "num_classes", "origin_url"):
        assert getattr(cfg, field) == getattr(start, field)


def test_a_depth_that_does_not_exist_has_the_nearest_names():
    with pytest.raises(ModelError, match="there is no model 'dcnv2_resnet34x'; did you mean dcnv2_resnet"):
        create_model("dcnv2_resnet34x")


# ---- what they start from


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_weights_of_the_plain_resnet_give_its_logits(name, tmp_path):
    start = plain(name)
    path = tmp_path / "plain.safetensors"
    save_file(start.state_dict(), path)
    x = torch.randn(2, 3, 64, 64)
    model = create(name, path)
    assert_close(model(x), start(x), EQUAL)
    assert not any(parameter.any() for parameter in offset_parameters(model))
    maps = create(name, path, features_only=True)(x)
    for actual, expected in zip(maps, start.forward_intermediates(x, intermediates_only=True), strict=True):
        assert_close(actual, expected, EQUAL)


@pytest.mark.parametrize(
    "arguments, plain_arguments",
    [
        (dict(num_classes=0), dict(num_classes=0)),
        (dict(output_stride=8), dict(output_stride=8)),
        (dict(stages=(1, 4), offset_groups=2), {}),
        (dict(modulated=False, stages=[3]), {}),
        (dict(dtype=torch.float64), dict(dtype=torch.float64)),
    ],
    ids=str,
)
@torch.no_grad()
def test_with_arguments(arguments, plain_arguments, tmp_path):
    start = plain()
    model = create("dcnv2_resnet18", saved(tmp_path / "plain.pth", start.state_dict()), **arguments)
    expected = timm.create_model("resnet18", **plain_arguments).eval()
    expected.load_state_dict(start.state_dict(), strict=plain_arguments.get("num_classes") != 0)
    x = torch.randn(2, 3, 64, 64, dtype=arguments.get("dtype"))
    assert_close(model(x), expected(x), 1e-11 if "dtype" in arguments else EQUAL)


@torch.no_grad()
def test_gray_images_and_new_classes(tmp_path, caplog):
    start = plain()
    path = saved(tmp_path / "plain.pth", start.state_dict())
    gray = create("dcnv2_resnet18", path, in_chans=1, num_classes=7)
    assert "has 1000 classes and 7 were asked for: the classifier is new" in caplog.text
    x = torch.randn(1, 1, 64, 64)
    assert_close(gray.forward_features(x), start.forward_features(x.expand(-1, 3, -1, -1)), 2 * EQUAL)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("resnet18", {}),
        ("resnet50", dict(output_stride=8)),
        ("resnext50_32x4d", {}),
        ("seresnet50", {}),
        ("resnetblur50", {}),
        ("resnetaa50", {}),
        ("resnet10t", {}),
    ],
)
@torch.no_grad()
def test_converted_in_place_without_a_change_of_the_logits(name, arguments):
    start, x = plain(name, **arguments), torch.randn(2, 3, 64, 64)
    expected = start(x)
    for modulated in (True, False):
        model = copy.deepcopy(start)
        parameters = {key: id(value) for key, value in model.named_parameters()}
        assert deform_convolutions(model, (1, 2, 3, 4), modulated, offset_groups=2) is model
        assert_close(model(x), expected, EQUAL)
        blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
        assert len(deformable(model)) == sum(
            2 if hasattr(b, "conv2") and not hasattr(b, "conv3") else 1 for b in blocks
        )
        assert parameters.items() <= {key: id(value) for key, value in model.named_parameters()}.items()
        assert not any(module.training for module in model.modules())


@torch.no_grad()
def test_a_new_model_and_initialization_again():
    """A new model computes what a new ResNet does, and `init_weights` makes it one again; timm's keeps offsets 0."""
    torch.manual_seed(1)
    new = timm.create_model("dcnv2_resnet18", zero_init_last=False).eval()
    torch.manual_seed(1)
    start = timm.create_model("resnet18", zero_init_last=False).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_close(new(x), start(x), EQUAL)
    model = trained("dcnv2_resnet18")
    model.init_weights()
    assert not any(parameter.any() for parameter in offset_parameters(model))
    # twice the standard deviation of kaiming normal for 256 x 9 outputs, within the scatter of 600,000 numbers
    assert model.layer3[1].conv2.weight.std() == pytest.approx(2 * (2 / (256 * 9)) ** 0.5, rel=0.02)
    converted = deform_convolutions(start)
    converted.init_weights()
    assert not any(parameter.any() for parameter in offset_parameters(converted))


# ---- checkpoints with offsets


def test_a_checkpoint_with_offsets_loads_as_it_is(tmp_path):
    source = trained("dcnv2_resnet18", **SMALL)
    path = saved(tmp_path / "w.pth", {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}})
    assert_same(create("dcnv2_resnet18", path, **SMALL).state_dict(), source.state_dict())
    model = timm.create_model("dcnv2_resnet18", **SMALL)
    model.load_pretrained(source.state_dict())
    assert_same(model.state_dict(), source.state_dict())


def mmdet(tmp_path, source: DCNResNet, change=lambda key: key):
    """A detector's file, as mmdetection writes it: the backbone without a classifier, neck and heads beside it."""
    backbone = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    tensors = {f"backbone.{change(key)}": value for key, value in backbone.items()}
    for key, shape in {
        "neck.lateral_convs.0.conv.weight": (8, 64, 1, 1),
        "neck.fpn_convs.0.conv.bias": (8,),
        "rpn_head.rpn_conv.weight": (8, 8, 3, 3),
        "roi_head.bbox_head.shared_fcs.0.weight": (4, 8),
        "roi_head.bbox_head.fc_cls.bias": (81,),
    }.items():
        tensors[key] = torch.randn(shape)
    meta = {"mmdet_version": "2.0.0", "config": "model = dict(type='FasterRCNN')", "CLASSES": ("person", "car")}
    return saved(tmp_path / "faster_rcnn.pth", {"meta": meta, "state_dict": tensors}), backbone


SPELLINGS = {
    "mmcv": lambda key: key,
    "mmcv, before version 2": lambda key: key.replace(".conv_offset.", "_offset."),
    "chengdazhi": lambda key: key.replace(".conv_offset.", ".conv_offset_mask."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["dcnv1_resnet50", "dcnv2_resnet50"])
@torch.no_grad()
def test_the_backbone_of_a_detector(name, spelling, tmp_path):
    source = trained(name, **SMALL)
    path, backbone = mmdet(tmp_path, source, SPELLINGS[spelling])
    arguments = {**SMALL, "num_classes": 0}
    assert_same(create(name, path, **arguments).state_dict(), backbone)
    x = torch.randn(1, 3, 64, 64)
    expected = source.forward_intermediates(x, intermediates_only=True)
    for actual, one in zip(create(name, path, **SMALL, features_only=True)(x), expected, strict=True):
        assert torch.equal(actual, one)
    with pytest.raises(CheckpointError, match="has a backbone and no head, so it cannot classify"):
        create(name, path, **SMALL)


def test_keys_of_a_detector_written_by_hand():
    """As the backbone of mmdetection's `faster_rcnn_r50_fpn_mdconv_c3-c5` has them."""
    shapes = {k: tuple(v.shape) for k, v in timm.create_model("dcnv2_resnet50", device="meta").state_dict().items()}
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer2.0.conv2.conv_offset.weight"] == (27, 128, 3, 3)
    assert shapes["layer2.0.conv2.conv_offset.bias"] == shapes["layer4.2.conv2.conv_offset.bias"] == (27,)
    assert shapes["layer3.5.conv2.conv_offset.weight"] == (27, 256, 3, 3)
    assert "layer1.0.conv2.conv_offset.weight" not in shapes and "layer2.0.conv2.bias" not in shapes


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bias_that_another_implementation_freezes_at_zero(value, tmp_path):
    source = trained("dcnv2_resnet50", **SMALL)
    tensors = source.state_dict()
    tensors["layer2.0.conv2.bias"] = torch.full((16,), value)
    if value:
        with pytest.raises(CheckpointError, match=r"unexpected: layer2.0.conv2.bias \(16,\)"):
            create("dcnv2_resnet50", saved(tmp_path / "w.pth", tensors), **SMALL)
    else:
        model = create("dcnv2_resnet50", saved(tmp_path / "w.pth", tensors), **SMALL)
        assert_same(model.state_dict(), source.state_dict())


def test_the_other_spelling_predicts_without_dilation(tmp_path):
    tensors = {SPELLINGS["chengdazhi"](k): v for k, v in trained("dcnv2_resnet18", **SMALL).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"conv_offset_mask.* dilation \(2, 2\)"):
        create("dcnv2_resnet18", saved(tmp_path / "w.pth", tensors), output_stride=16, **SMALL)


@pytest.mark.parametrize(
    "file, model, arguments",
    [
        # the v1 detectors of mmdetection deform conv3 to conv5 in one group
        (dict(stages=(2, 3, 4), offset_groups=1), "dcnv1_resnet50", "stages=(2, 3, 4), offset_groups=1"),
        (dict(stages=(2, 3, 4), offset_groups=1), "dcnv2_resnet50", "modulated=False"),
        ({}, "dcnv2_resnet50", "stages=(4,), modulated=False, offset_groups=4"),
        (dict(modulated=True), "dcnv1_resnet50", "modulated=True"),
    ],
)
def test_the_error_names_the_arguments_that_fit(file, model, arguments, tmp_path):
    source = trained("dcnv1_resnet50", **file, **SMALL)
    path = saved(tmp_path / "w.pth", source.state_dict())
    target = timm.create_model(model, **SMALL)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError) as error:
        target.load_pretrained(path)
    assert str(error.value).splitlines()[-1] == (
        f"The file has other deformable convolutions: create the model with {arguments}, as `internimage convert` "
        f"without --model does"
    )
    assert_same(target.state_dict(), before)
    found = {"block": "bottleneck", **target.arguments_of({k: tuple(v.shape) for k, v in source.state_dict().items()})}
    assert_same(create(model, path, **{**SMALL, **found}).state_dict(), source.state_dict())


def test_other_depths_and_other_models(tmp_path):
    path = saved(tmp_path / "w.pth", plain("resnet34").state_dict())
    with pytest.raises(CheckpointError, match="another size: basic blocks, channels=64, .*3, 4, 6, 3.*has bottleneck"):
        create("dcnv2_resnet50", path)
    with pytest.raises(CheckpointError, match="holds no ResNet: no 'conv1.weight' in it"):
        create("dcnv2_resnet18", saved(tmp_path / "v.pth", timm.create_model("internimage_atto").state_dict()))
    with pytest.raises(CheckpointError, match="holds no InternImage"):
        create("internimage_atto", path)
    # a part of the offsets is neither a plain ResNet nor one with offsets
    tensors = trained("dcnv2_resnet18", **SMALL).state_dict()
    del tensors["layer3.0.conv1.conv_offset.weight"], tensors["layer3.0.conv1.conv_offset.bias"]
    with pytest.raises(CheckpointError, match="2 differences:\n  missing: layer3.0.conv1.conv_offset.weight"):
        create("dcnv2_resnet18", saved(tmp_path / "u.pth", tensors), **SMALL)


def test_state_dicts_of_the_other_version_are_named_by_torchs_own_loading():
    v1 = timm.create_model("dcnv2_resnet18", modulated=False, **SMALL)
    v2 = timm.create_model("dcnv2_resnet18", **SMALL)
    for one, other, name in ((v1, v2, "DeformConv2d"), (v2, v1, "ModulatedDeformConv2d")):
        with pytest.raises(CheckpointError, match=rf"^'layer2.0.conv1.conv_offset.weight' has .* as in {name}\(") as e:
            other.load_state_dict(one.state_dict())
        assert "\n" not in str(e.value)
    old = {SPELLINGS["mmcv, before version 2"](key): value for key, value in v2.state_dict().items()}
    v2.load_state_dict(old)
    deform_convolutions(timm.create_model("resnet18", **SMALL)).load_state_dict(old)


def test_weights_that_are_not_finite_are_named_once(tmp_path, caplog):
    tensors = plain(**SMALL).state_dict()
    tensors["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    create("dcnv2_resnet18", saved(tmp_path / "w.pth", tensors), **SMALL)
    assert "NaN or infinity in 1 tensors: layer2.0.conv1.weight" in caplog.text


# ---- bad input


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnetv2_50", {}, "'resnetv2_50' is no ResNet of timm's .*got ResNetV2"),
        ("resnest14d", {}, "stage 2 of 'resnest14d' has blocks of the kind ResNestBottleneck"),
        ("res2net50_26w_4s", {}, "blocks of the kind Bottle2neck"),
        ("vit_tiny_patch16_224", {}, "got VisionTransformer"),
        ("dcnv2_resnet18", {}, "stage 2 of 'dcnv2_resnet18' is deformable already"),
        (
            "resnet18",
            dict(offset_groups=48),
            "offset_groups must divide the 64 channels of 'layer2.0.conv1' of 'resnet18'",
        ),
        ("resnet18", dict(offset_groups=0), "offset_groups must be a whole number from 1"),
        ("resnet18", dict(stages=()), "stages must name at least one of 1 to 4"),
        ("resnet18", dict(stages=(2, 2)), "stages must name at least one of 1 to 4, and each once"),
        ("resnet18", dict(stages=(5,)), "each of stages must be a whole number from 1 to 4, got 5"),
        ("resnet18", dict(stages="234"), "stages must be some of 1, 2, 3 and 4, got '234'"),
        ("resnet18", dict(stages=4), "stages must be some of 1, 2, 3 and 4, got 4"),
        ("resnet18", dict(modulated="v2"), "modulated must be true or false, got 'v2'"),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, dict)) else "",
)
def test_what_cannot_be_deformed_is_named_and_unchanged(name, arguments, message):
    model = timm.create_model(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        deform_convolutions(model, **arguments)
    assert "\n" not in str(error.value)
    assert_same(model.state_dict(), before)


@torch.no_grad()
def test_convolutions_that_are_no_plain_ones():
    model = timm.create_model("resnet18")
    model.layer4[1].conv2 = nn.Conv2d(512, 512, 3, padding="same")
    with pytest.raises(
        DeformError, match="'layer4.1.conv2' of 'resnet18' is no plain convolution with zeros as padding"
    ):
        deform_convolutions(model)
    assert not deformable(model)
    model.layer4[1].conv2 = nn.Conv2d(512, 512, 5, padding=2)
    with pytest.raises(DeformError, match=r"is no 3x3 convolution: its kernel is \(5, 5\)"):
        deform_convolutions(model)
    for block in model.layer4:
        block.conv1 = block.conv2 = nn.Conv2d(512, 512, 1)
    with pytest.raises(DeformError, match="stage 4 of 'resnet18' has no 3x3 convolutions"):
        deform_convolutions(model, (4,))
    model.layer3 = nn.Sequential()
    with pytest.raises(DeformError, match="stage 3 of 'resnet18' has no 3x3 convolutions"):
        deform_convolutions(model, (3,))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(block="bottle"), "block must be 'basic' or 'bottleneck', got 'bottle'"),
        (dict(layers=(2, 2, 2)), "layers and channels must name four stages"),
        (dict(layers=3), "layers must be a sequence"),
        (dict(layers=(2, 2, 2, 0)), "each of layers must be a whole number from 1"),
        (dict(output_stride=4), "output_stride must be 8, 16 or 32, got 4"),
        (dict(global_pool="mean"), "global_pool must be one of"),
        (dict(global_pool=""), "pass num_classes=0, not 1000"),
        (dict(cardinality=32), "basic blocks have cardinality 1"),
        (dict(block="bottleneck", base_width=0), "base_width must be a whole number from 1"),
        (dict(drop_rate=2), "drop_rate must be a number from 0 to 1"),
        (dict(in_chans=0), "in_chans must be a whole number from 1"),
        (dict(num_classes=-1), "num_classes must be a whole number from 0"),
        (dict(zero_init_last="no"), "zero_init_last must be true or false"),
        (dict(offset_groups=3), "offset_groups must divide the 64 channels of 'layer2.0.conv1'"),
        (dict(stages=(0,)), "each of stages must be a whole number from 1 to 4"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dcnv2_resnet18", device="meta", **arguments)


# ---- timm's contract: what scripts/checks/timm_contract.py does not ask for


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_graphs_checkpointing_and_parts():
    model, x = trained("dcnv2_resnet18", **SMALL), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert_close(torch.jit.script(model)(x), expected, EQUAL)
        assert_close(torch.export.export(model, (x,)).module()(x), expected, EQUAL)
        last = torch.channels_last
        assert_close(copy.deepcopy(model).to(memory_format=last)(x.to(memory_format=last)), expected, EQUAL)
    model(x).sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad, grads[key], EQUAL, key)
    _, stages = stem_and_stages(model)
    assert [modules for modules in stages] == [[getattr(model, f"layer{i}")] for i in range(1, 5)]
    assert repeated_blocks(model) == [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
    assert list(sampling_layers(model)) == list(deformable(model))
    assert frozen_parts(model, 2)[-2:] == [model.layer1, model.layer2]


@torch.no_grad()
def test_classifiers():
    model, x = trained("dcnv2_resnet18", **SMALL), torch.randn(2, 3, 64, 64)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3) and model.get_classifier() is model.fc
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 64, 2, 2)
    model.reset_classifier(4)  # which needs a pooled vector
    assert model(x).shape == (2, 4)
    with pytest.raises(ValueError, match="pass num_classes=0, not 4"):
        model.reset_classifier(4, "")


@torch.no_grad()
def test_points_of_a_stage():
    model = trained("dcnv2_resnet18", **SMALL)
    layer, locations, weights = sampled_points(model, torch.randn(1, 3, 64, 64))
    assert layer == "layer3.1.conv2" and locations.shape == (1, 4, 4, 1, 9, 2) and weights.shape == (1, 4, 4, 1, 9)
    for parameter in offset_parameters(model):
        nn.init.zeros_(parameter)
    _, locations, weights = sampled_points(model, torch.randn(1, 3, 64, 64), "layer2.0.conv1")
    # stride 2 over a map of 16 x 16: output pixel (1, 2) reads around pixel (2, 4), each of 4 image pixels
    assert locations[0, 1, 2, 0, 4].tolist() == [4 * 4 + 1.5, 2 * 4 + 1.5] and (weights == 0.5).all()
    assert locations[0, 1, 2, 0, 5].tolist() == [5 * 4 + 1.5, 2 * 4 + 1.5]  # row by row: next is the one on the right


def test_offset_lr_factor_covers_offsets_and_masks():
    model = timm.create_model("dcnv2_resnet18", **SMALL)
    config = RunConfig(output="x", lr=1.0, offset_lr_factor=0.1, sched="none")
    optimizer, _ = create_optimizer(model, config, 10)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        assert rate[id(parameter)] == pytest.approx(0.1 if ".conv_offset." in key else 1.0), key
