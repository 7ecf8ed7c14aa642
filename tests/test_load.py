# SPDX-License-Identifier: MIT
"""The one reader: every source gives the right numbers, or nothing is written and the message says why."""

import json
import logging
import re
from pathlib import Path

import formats
import golden
import huggingface_hub
import pytest
import timm
import timm.models
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from internimage import CheckpointError
from internimage.cli import main
from internimage.models import PUBLISHED, InternImage
from internimage.weights import hub
from internimage.weights.comparison import find_model
from internimage.weights.key_maps import INTERNIMAGE
from internimage.weights.load import count_classes
from internimage.weights.readers import Entry, Weights, open_weights

# a model of every part in a hundredth of the time; the layer scale has names of its own in some formats
SMALL = dict(channels=8, depths=(1, 1, 2, 1), groups=(1, 1, 2, 4))
SCALED = dict(SMALL, layer_scale=1.0)
CLASSES = [None, 5, 0]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are so small here that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def create(path=None, name: str = "internimage_atto", **kwargs) -> nn.Module:
    """A small pretrained model; `path` is None where the name says where the weights are."""
    overlay = {} if path is None else dict(pretrained_cfg_overlay=dict(file=str(path)))
    return timm.create_model(name, pretrained=True, **{**SCALED, **overlay, **kwargs})


def new(**kwargs) -> InternImage:
    return timm.create_model("internimage_atto", **{**SCALED, **kwargs})


def filled(**kwargs) -> dict[str, Tensor]:
    """The golden weights of a small model with these arguments."""
    return golden.fill_state_dict({key: value.shape for key, value in new(**kwargs).state_dict().items()})


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled()


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def assert_refused(model: nn.Module, source, message: str, **options) -> str:
    """Loading raises, and leaves every parameter and buffer as it was; gives the message."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        model.load_pretrained(source, **options)
    assert_equal(model.state_dict(), before)
    return str(error.value)


def warnings_of(caplog) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("internimage")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


# ---- every format, with every adaptation


@pytest.fixture(scope="module")
def files(tmp_path_factory, weights):
    """Kind of file -> its path, written once."""
    paths: dict[str, Path] = {}

    def path_of(kind: str) -> Path:
        if kind not in paths:
            paths[kind] = formats.write(kind, tmp_path_factory.mktemp("weights"), weights)
        return paths[kind]

    return path_of


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("kind", formats.KINDS)
def test_every_format(kind, num_classes, in_chans, files, weights, caplog):
    if kind in formats.HEADLESS and num_classes != 0:
        with pytest.raises(CheckpointError, match="no head.*features_only=True or num_classes=0"):
            create(files(kind), num_classes=num_classes, in_chans=in_chans)
        return
    path = files(kind)
    expected = {key: weights[key] for key in new(num_classes=num_classes, in_chans=in_chans).state_dict()}
    torch.manual_seed(1)
    warning = None
    if kind in formats.HEADLESS:
        warning = "conv_head keep"
        expected["conv_head.0.weight"] = nn.Conv2d(64, 96, 1, bias=False).weight.detach()
        norm = nn.BatchNorm2d(96).state_dict()
        expected.update({f"conv_head.1.0.{key}": value for key, value in norm.items()})
    elif num_classes == 5:
        warning = "1000 classes and 5 were asked for: the classifier is new"
        expected["head.weight"] = trunc_normal_(torch.empty(5, 96), std=0.02)
        expected["head.bias"] = torch.zeros(5)
    if in_chans == 1:
        expected["patch_embed.conv1.weight"] = weights["patch_embed.conv1.weight"].sum(1, keepdim=True)
    torch.manual_seed(1)
    model = create(path, num_classes=num_classes, in_chans=in_chans)
    assert_equal(model.state_dict(), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    messages = warnings_of(caplog)
    assert len(messages) == (warning is not None), messages
    if warning:
        assert warning in messages[0] and str(path) in messages[0]


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("kind", formats.KINDS)
def test_every_format_as_features(kind, in_chans, files, weights, caplog):
    model = create(files(kind), features_only=True, out_indices=(0, 2), in_chans=in_chans)
    actual = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    expected = {key: weights[key] for key in actual}
    if in_chans == 1:
        key = "patch_embed.conv1.weight"
        expected[key] = weights[key].sum(1, keepdim=True)
    assert_equal(actual, expected)
    assert {key.split(".")[1] for key in actual if key.startswith("levels")} == {"0", "1", "2"}
    assert [tuple(x.shape[1:]) for x in model(torch.zeros(1, in_chans, 32, 32))] == [(8, 8, 8), (32, 2, 2)]
    assert warnings_of(caplog) == []


def test_features_do_not_mind_the_classes(tmp_path, weights):
    for name, head in (("bad head", {"head.weight": torch.ones(3), "head.bias": torch.ones(7)}), ("no bias", {})):
        state_dict = {key: value for key, value in weights.items() if not key.startswith("head.")}
        path = formats.save_safetensors(tmp_path / f"{name}.safetensors", {**state_dict, **head})
        model = create(path, features_only=True)
        assert torch.equal(model.state_dict()["model.levels.3.blocks.0.gamma2"], weights["levels.3.blocks.0.gamma2"])


def test_head_that_does_not_matter_is_taken_where_it_fits(files, weights):
    model = new()
    model.load_pretrained(files("ours"), backbone_only=True)
    assert_equal(model.state_dict(), weights)
    model = new(num_classes=5)
    initial = model.head.weight.clone()
    model.load_pretrained(files("ours"), backbone_only=True)
    assert torch.equal(model.head.weight, initial)
    assert torch.equal(model.conv_head[0].weight, weights["conv_head.0.weight"])


@pytest.mark.parametrize("num_classes", CLASSES)
def test_attentive_head(num_classes, tmp_path, caplog):
    arguments = dict(SMALL, layer_scale=None, stage3_post_norm_blocks=(1,))
    huge = "internimage_huge.ogvl_joint_in22k_ft_in1k_640"
    shapes = timm.create_model(huge, device="meta", **arguments).state_dict()
    weights = golden.fill_state_dict({key: value.shape for key, value in shapes.items()})
    whole = formats.write("Hub, shards", tmp_path / "whole", weights)
    model = create(whole, huge, **arguments, num_classes=num_classes)
    other = () if num_classes is None else "head."
    actual = {key: value for key, value in model.state_dict().items() if not key.startswith(other)}
    assert_equal(actual, {key: value for key, value in weights.items() if not key.startswith(other)})
    assert len(warnings_of(caplog)) == (num_classes == 5)
    backbone = formats.write("segmentor", tmp_path / "backbone", weights)
    if num_classes != 0:
        with pytest.raises(CheckpointError, match="no head"):
            create(backbone, huge, **arguments, num_classes=num_classes)
    else:
        caplog.clear()
        create(backbone, huge, **arguments, num_classes=0)
        assert "clip_projector and dcnv3_head_x3 and dcnv3_head_x4 and fc_norm keep" in caplog.text
    assert len(create(backbone, huge, **arguments, features_only=True)(torch.zeros(1, 3, 32, 32))) == 4


@pytest.mark.parametrize("file", golden.MODELS)
def test_hub_names_of_every_released_model(file):
    shapes = golden.manifest()[file]["shapes"]
    entries = {
        key: Entry(tuple(shape), torch.float32, lambda: None) for key, shape in formats.hub_names(shapes).items()
    }
    found, beside = find_model(Weights(entries, "it"), INTERNIMAGE)
    assert beside == []
    assert {key: list(entry.shape) for key, entry in found.items()} == shapes


# ---- channels


@pytest.mark.parametrize("in_chans", [2, 4, 7])
def test_more_channels_repeat_and_scale(in_chans, weights, files):
    first = weights["patch_embed.conv1.weight"]
    actual = create(files("ours"), in_chans=in_chans).state_dict()["patch_embed.conv1.weight"]
    expected = first.repeat(1, 3, 1, 1)[:, :in_chans] * (3 / in_chans)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_file_that_has_the_channels_already(tmp_path):
    weights = filled(in_chans=1)
    path = formats.save_safetensors(tmp_path / "w.safetensors", weights)
    assert_equal(create(path, in_chans=1).state_dict(), weights)
    message = "patch_embed.conv1.weight is (4, 1, 3, 3) in the file and (4, 3, 3, 3) in the model"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        create(path)
    # told what the file is for, timm's rule goes in this direction too
    overlay = dict(file=str(path), input_size=(1, 224, 224))
    model = timm.create_model("internimage_atto", True, pretrained_cfg_overlay=overlay, in_chans=3, **SCALED)
    expected = weights["patch_embed.conv1.weight"].repeat(1, 3, 1, 1) / 3
    torch.testing.assert_close(model.state_dict()["patch_embed.conv1.weight"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (4, 3, 5, 5), (4, 4, 3, 3), (4, 3), (3,), ()])
def test_only_the_channels_are_adapted(shape, weights):
    changed = {**weights, "patch_embed.conv1.weight": torch.ones(shape)}
    assert_refused(new(in_chans=1), changed, r"1 differences:\n  shape: patch_embed.conv1.weight")


# ---- what does not fit


CHANGES = {
    "missing, first": (lambda sd: sd.pop("patch_embed.conv1.weight"), "missing: patch_embed.conv1.weight (4, 3, 3, 3)"),
    "missing, stem": (lambda sd: sd.pop("patch_embed.conv2.bias"), "missing: patch_embed.conv2.bias (8,)"),
    "missing, block": (
        lambda sd: sd.pop("levels.2.blocks.1.dcn.mask.bias"),
        "missing: levels.2.blocks.1.dcn.mask.bias (18,)",
    ),
    "missing, layer scale": (lambda sd: sd.pop("levels.3.blocks.0.gamma2"), "missing: levels.3.blocks.0.gamma2 (64,)"),
    "missing, statistics": (lambda sd: sd.pop("conv_head.1.0.running_var"), "missing: conv_head.1.0.running_var (96,)"),
    "missing, half a classifier": (lambda sd: sd.pop("head.bias"), "missing: head.bias (1000,)"),
    "extra": (
        lambda sd: sd.update({"levels.0.blocks.0.extra": torch.ones(3)}),
        "unexpected: levels.0.blocks.0.extra (3,)",
    ),
    "extra, outside": (lambda sd: sd.update({"meta_head.weight": torch.ones(3)}), "unexpected: meta_head.weight (3,)"),
    "transposed": (
        lambda sd: sd.update({"levels.1.blocks.0.mlp.fc1.weight": torch.ones(16, 64)}),
        "shape: levels.1.blocks.0.mlp.fc1.weight is (16, 64) in the file and (64, 16) in the model (transposed)",
    ),
    "broadcastable": (
        lambda sd: sd.update({"levels.1.blocks.0.mlp.fc1.bias": torch.ones(1)}),
        "shape: levels.1.blocks.0.mlp.fc1.bias is (1,) in the file and (64,) in the model",
    ),
    "scalar": (
        lambda sd: sd.update({"levels.0.norm.0.bias": torch.tensor(1.0)}),
        "shape: levels.0.norm.0.bias is () in the file and (8,) in the model",
    ),
    "whole numbers": (
        lambda sd: sd.update({"levels.0.norm.0.bias": torch.ones(8, dtype=torch.int32)}),
        "dtype: levels.0.norm.0.bias holds torch.int32 in the file, and the model needs torch.float32",
    ),
    "classifier's width": (
        lambda sd: sd.update({"head.weight": torch.ones(1000, 95)}),
        "shape: head.weight is (1000, 95) in the file and (1000, 96) in the model",
    ),
}


@pytest.mark.parametrize("kind", ["official", "Hub, shards", "in memory"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_difference_is_an_error_and_nothing_is_written(change, kind, weights, tmp_path):
    edit, line = CHANGES[change]
    state_dict = dict(weights)
    edit(state_dict)
    source = state_dict if kind == "in memory" else formats.write(kind, tmp_path, state_dict)
    message = assert_refused(new(), source, "nothing was loaded. 1 differences:")
    assert f"\n  {line}" in message
    assert ("the state dict" if kind == "in memory" else str(source)) in message


class OwnTensor(Tensor):
    """What another library might hand over."""


# tensors that are no plain numbers in memory, and what is said of them
ODD = {
    "sparse": (lambda t: t.to_sparse(), "sparse.*to_dense"),
    "sparse rows": (lambda t: t.to_sparse_csr(), "sparse.*to_dense"),
    "meta": (lambda t: t.to("meta"), "meta device.*no numbers"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t[:1]]), "nested"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized.*dequantize"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn.*float64, float32, bfloat16 or float16"),
    "float8 of another kind": (lambda t: t.to(torch.float8_e5m2fnuz), "float8_e5m2fnuz"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "whole numbers": (lambda t: t.to(torch.int8), "holds torch.int8"),
    "of a class of its own": (lambda t: t.as_subclass(OwnTensor), "OwnTensor"),
    "without shape": (lambda t: torch.nn.UninitializedParameter(), "UninitializedParameter"),
    "empty": (lambda t: t[:0], r"is \(0, 16\) in the file"),
    "scalar": (lambda t: t.sum(), r"is \(\) in the file"),
}
ODD_IN_A_FILE = [kind for kind in ODD if kind not in ("nested", "of a class of its own", "without shape")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, where", [(k, "in memory") for k in ODD] + [(k, "official") for k in ODD_IN_A_FILE])
def test_tensor_that_holds_no_plain_numbers_is_named_and_nothing_is_written(kind, where, weights, tmp_path, capsys):
    make, message = ODD[kind]
    key = "levels.1.blocks.0.mlp.fc1.weight"
    changed = {**weights, key: make(weights[key])}
    if where == "in memory":
        assert_refused(new(), changed, rf"{re.escape(key)}(?s:.*){message}")
        return
    torch.save(changed, tmp_path / "w.pth")
    assert_refused(new(), tmp_path / "w.pth", rf"{re.escape(key)}(?s:.*){message}")
    arguments = ["--model", "internimage_atto", "--model-kwargs", *(f"{k}={json.dumps(v)}" for k, v in SCALED.items())]
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "out"), *arguments]) == 2
    assert key in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["optimizer", "neck.conv.weight"])
def test_odd_tensor_beside_the_model_does_not_matter(key, weights, tmp_path):
    beside = {f"backbone.{name}": value for name, value in weights.items()}
    path = formats.save_torch(tmp_path / "w.pth", {"state_dict": {**beside, key: torch.ones(2).to_sparse()}})
    model = new()
    model.load_pretrained(path)
    assert_equal(model.state_dict(), weights)


def test_parameters_are_plain_tensors(weights):
    model = new()
    model.load_pretrained({key: torch.nn.Parameter(v) if v.is_floating_point() else v for key, v in weights.items()})
    assert_equal(model.state_dict(), weights)


@pytest.mark.parametrize("kind", ["official", "ours"])
def test_backbone_differences_count_for_features_too(kind, weights, tmp_path):
    for name in ("missing, block", "extra", "transposed"):
        state_dict = dict(weights)
        CHANGES[name][0](state_dict)
        path = formats.write(kind, tmp_path / name, state_dict)
        for options in (dict(features_only=True), dict(num_classes=0), dict(num_classes=5)):
            with pytest.raises(CheckpointError, match=re.escape(CHANGES[name][1])):
                create(path, **options)


def test_first_ten_differences_are_listed(weights):
    keys = [key for key in weights if key.startswith("levels.2.blocks.1.")][:12]
    changed = {("x." + key if key in keys else key): value for key, value in weights.items()}
    lines = assert_refused(new(), changed, "24 differences").splitlines()
    assert lines[1:11] == [f"  missing: {key} {tuple(weights[key].shape)}" for key in keys[:10]]
    assert lines[11] == "  and 14 more"


def test_comparison_reads_nothing(monkeypatch, weights, tmp_path):
    reads = formats.record_reads(monkeypatch)
    path = formats.write("Hub, shards", tmp_path, {**weights, "extra": torch.ones(1)})
    assert_refused(new(), path, "unexpected: extra")
    assert reads == []
    path = formats.write("ours", tmp_path / "good", weights)
    new().load_pretrained(path)
    assert sorted(reads) == sorted(tuple(value.shape) for value in weights.values())


def test_counter_of_training_steps_is_optional(weights):
    key = "conv_head.1.0.num_batches_tracked"
    model = new()
    model.load_pretrained({k: v for k, v in weights.items() if k != key})
    assert_equal(model.state_dict(), {**weights, key: torch.tensor(0)})


def test_half_precision_file(weights, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    model = create(formats.save_safetensors(tmp_path / "w.safetensors", half))
    assert_equal(model.state_dict(), {key: value.to(weights[key].dtype) for key, value in half.items()})


def test_other_model(tmp_path):
    resnet = timm.create_model("resnet18", num_classes=2).state_dict()
    message = assert_refused(new(), formats.save_torch(tmp_path / "w.pth", {"model": resnet}), "holds no InternImage")
    assert "conv1.weight" in message and f"{len(resnet)} tensors" in message


def test_other_size(weights):
    wider = filled(channels=16, groups=(1, 2, 4, 8))
    message = assert_refused(new(), wider, "does not fit")
    assert "shape: patch_embed.conv1.weight is (8, 3, 3, 3) in the file and (4, 3, 3, 3) in the model" in message
    assert "another size: channels=16, depths=(1, 1, 2, 1); the model has channels=8, depths=(1, 1, 2, 1)" in message
    deeper = filled(depths=(1, 1, 3, 1))
    assert "depths=(1, 1, 3, 1); the model has" in assert_refused(new(), deeper, "unexpected: levels.2.blocks.2")
    assert "depths=(1, 1, 2, 1); the model has" in assert_refused(
        new(depths=(1, 1, 3, 1)), weights, "missing: levels.2.blocks.2"
    )


def test_several_models_in_one_file(weights):
    both = {**formats.prefixed("model.", weights), **formats.prefixed("module.", weights)}
    assert_refused(new(), both, "several models: under 'model.', 'module.'")
    assert_refused(new(), formats.prefixed("encoder.", weights), "holds no InternImage.*encoder.patch_embed")


def test_keys_that_would_hide_each_other(weights):
    prefixed = formats.hub_names(weights)
    message = assert_refused(new(), {**prefixed, "head.weight": weights["head.weight"]}, "1 differences")
    assert "unexpected: head.weight (without 'model.')" in message
    message = assert_refused(new(), {**prefixed, "model.levels.0.blocks.0.gamma1": torch.ones(8)}, "1 differences")
    assert "levels.0.blocks.0.gamma1 (again, as model.levels.0.blocks.0.gamma1)" in message


def test_model_on_the_meta_device_cannot_be_filled(weights, tmp_path):
    with pytest.raises(CheckpointError, match="meta device.*to_empty"):
        new(device="meta").load_pretrained(weights)
    # before anything is downloaded, or a file is looked for
    with pytest.raises(CheckpointError, match="device='meta' holds no weights.*pretrained=False"):
        create(tmp_path / "missing", device="meta")
    with torch.device("meta"), pytest.raises(CheckpointError, match="device='meta' holds no weights"):
        create(tmp_path / "missing")


def test_pretrained_models_are_whole_models(files, weights):
    """They are built on the meta device and filled: nothing may be left there, shared, or frozen."""
    model = create(files("ours"), dtype=torch.bfloat16)
    assert_equal(
        model.state_dict(), {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in weights.items()}
    )
    model = timm.create_model("internimage_atto", True, pretrained_cfg_overlay=dict(state_dict=weights), **SCALED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert weights["head.weight"].abs().sum() > 0, "the caller's own tensors were taken"
    model = create(files("ours"), num_classes=5)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.load_pretrained(files("ours"), pretrained_cfg=dict(num_classes=1000))
    before = model.levels[0].norm[0].weight
    model.load_pretrained(files("Hub"), pretrained_cfg=dict(num_classes=1000))
    assert model.levels[0].norm[0].weight is before, "a model in use keeps its parameters: an optimizer has them"


# ---- numbers that cannot be right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_named(value, dtype, weights, caplog, tmp_path):
    bad = formats.cast(weights, dtype)
    for key in ("levels.2.blocks.1.mlp.fc2.weight", "patch_embed.conv1.bias"):
        bad[key] = bad[key].clone()
        bad[key].view(-1)[1] = value
    model = create(formats.save_safetensors(tmp_path / "w.safetensors", bad))
    (message,) = warnings_of(caplog)
    assert "NaN or infinity in 2 tensors: levels.2.blocks.1.mlp.fc2.weight, patch_embed.conv1.bias" in message
    assert not torch.isfinite(model.patch_embed.conv1.bias[1])


def test_large_weights_are_no_cause_for_a_warning(weights, caplog):
    largest = {
        k: torch.full_like(v, torch.finfo(v.dtype).max) if v.is_floating_point() else v for k, v in weights.items()
    }
    new().load_pretrained(largest)
    new(dtype=torch.float64).load_pretrained(
        {k: v.double() if v.is_floating_point() else v for k, v in largest.items()}
    )
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "content, message", [(b"", "empty"), (b"<html>", "web page"), (b"PK\x03\x04" + b"\0" * 99, "damaged")]
)
def test_broken_file_through_timm(content, message, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        create(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        create(tmp_path / "missing.pth")


# ---- classes


def test_classes_of_the_file_must_be_asked_for(tmp_path, caplog):
    weights = filled(num_classes=7)
    path = formats.save_safetensors(tmp_path / "w.safetensors", weights)
    with pytest.raises(CheckpointError, match="The file has 7 classes: create the model with num_classes=7"):
        create(path)
    assert_equal(create(path, num_classes=7).state_dict(), weights)
    assert warnings_of(caplog) == []
    create(path, num_classes=3)
    assert "7 classes and 3 were asked for" in caplog.text


def test_classes_of_imagenet_22k(tmp_path, caplog):
    weights = filled(num_classes=21841)
    path = formats.write("official", tmp_path, weights)
    with pytest.raises(CheckpointError, match="create the model with num_classes=21841"):
        create(path)
    told = dict(pretrained_cfg_overlay=dict(file=str(path), num_classes=21841), **SCALED)
    assert_equal(timm.create_model("internimage_atto", pretrained=True, **told).state_dict(), weights)
    assert warnings_of(caplog) == []
    model = timm.create_model("internimage_atto", pretrained=True, **told, num_classes=1000)
    assert model.head.weight.shape == (1000, 96) and (model.head.bias == 0).all()
    assert len(warnings_of(caplog)) == 1 and "21841 classes and 1000 were asked for" in caplog.text


@pytest.mark.parametrize("kind", formats.KINDS)
def test_classes_are_counted_without_a_model(kind, files, monkeypatch):
    reads = formats.record_reads(monkeypatch)
    assert count_classes(open_weights(files(kind)), INTERNIMAGE) == (0 if kind in formats.HEADLESS else 1000)
    assert reads == []


def test_classes_of_a_broken_classifier(weights, tmp_path):
    path = formats.save_safetensors(tmp_path / "w.safetensors", {**weights, "head.weight": torch.tensor(1.0)})
    assert count_classes(open_weights(path), INTERNIMAGE) == 0
    assert_refused(new(), path, r"shape: head.weight is \(\) in the file and \(1000, 96\) in the model")


def test_file_without_classifier(tmp_path):
    weights = filled(num_classes=0)
    path = formats.save_safetensors(tmp_path / "w.safetensors", weights)
    assert_equal(create(path, num_classes=0).state_dict(), weights)
    with pytest.raises(CheckpointError, match=r"missing: head.weight[^$]*no classifier: load it with num_classes=0"):
        create(path)


def test_tiny_of_the_detectors_has_a_layer_scale(tmp_path):
    weights = filled(layer_scale=1.0)
    path = formats.write("detector", tmp_path, weights)
    plain = dict(features_only=True, layer_scale=None)
    with pytest.raises(CheckpointError, match=r"unexpected: levels.0.blocks.0.gamma1[^$]*layer_scale=1.0"):
        create(path, "internimage_tiny", **plain)
    model = create(path, "internimage_tiny", **{**plain, "layer_scale": 1.0})
    assert torch.equal(model.state_dict()["model.levels.2.blocks.1.gamma1"], weights["levels.2.blocks.1.gamma1"])


# ---- averaged weights


def test_averaged_weights(tmp_path, weights, caplog):
    averaged = formats.shifted(weights)
    path = formats.save_official(tmp_path / "w.pth", {"model": weights, "model_ema": averaged})
    for options, expected, took in (({}, weights, "model"), (dict(use_ema=True), averaged, "model_ema")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="internimage"):
            assert_equal(create(path, **options).state_dict(), expected)
        assert f"took '{took}'" in caplog.text and str(path) in caplog.text
    only = formats.write("official", tmp_path / "only", weights)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        create(only, use_ema=True)


def test_model_made_of_averaged_weights_can_be_saved_and_loaded(tmp_path, weights):
    """timm writes the arguments of create_model into config.json, use_ema among them."""
    averaged = formats.shifted(weights)
    path = formats.save_official(tmp_path / "w.pth", {"model": weights, "model_ema": averaged})
    for safe in (True, False):
        timm.models.save_for_hf(create(path, use_ema=True), tmp_path / str(safe), safe_serialization=safe)
        model = timm.create_model(f"local-dir:{tmp_path / str(safe)}", pretrained=True)
        assert_equal(model.state_dict(), averaged)


# ---- timm's other ways to the reader


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_folder_of_timm(safe, tmp_path, caplog):
    weights = filled(num_classes=7)
    model = new(num_classes=7)
    model.load_state_dict(weights)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    name = f"local-dir:{tmp_path}"
    assert_equal(timm.create_model(name, pretrained=True).state_dict(), weights)
    assert timm.create_model(name).num_classes == 7
    assert timm.create_model(name, pretrained=True, num_classes=0).num_classes == 0
    assert len(timm.create_model(name, pretrained=True, features_only=True).feature_info) == 4
    gray = timm.create_model(name, pretrained=True, in_chans=1).state_dict()
    assert torch.equal(gray["patch_embed.conv1.weight"], weights["patch_embed.conv1.weight"].sum(1, keepdim=True))
    assert warnings_of(caplog) == []
    assert timm.create_model(name, pretrained=True, num_classes=5).head.out_features == 5
    assert "7 classes and 5 were asked for" in caplog.text


def test_folder_of_timm_keeps_what_was_adapted(tmp_path, caplog):
    weights = filled(num_classes=0, in_chans=1)
    model = new(num_classes=0, in_chans=1)
    model.load_state_dict(weights)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    name = f"local-dir:{tmp_path}"
    assert_equal(timm.create_model(name, pretrained=True).state_dict(), weights)
    assert warnings_of(caplog) == []
    color = timm.create_model(name, pretrained=True, in_chans=3, num_classes=4)
    assert "0 classes and 4 were asked for: the classifier is new" in caplog.text
    expected = weights["patch_embed.conv1.weight"].repeat(1, 3, 1, 1) / 3
    torch.testing.assert_close(color.patch_embed.conv1.weight.detach(), expected, rtol=1e-6, atol=0)


def test_folder_without_configuration_or_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    timm.models.save_for_hf(new(num_classes=2), tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("wrap", [dict, lambda sd: {"model": sd, "epoch": 1}, formats.hub_names])
def test_state_dict_in_memory(wrap, weights):
    overlay = dict(state_dict=wrap(weights))
    model = timm.create_model("internimage_atto", pretrained=True, pretrained_cfg_overlay=overlay, **SCALED)
    assert_equal(model.state_dict(), weights)


def test_state_dict_in_memory_that_is_empty():
    with pytest.raises(CheckpointError, match="the state dict holds no tensors"):
        timm.create_model("internimage_tiny", pretrained=True, pretrained_cfg_overlay=dict(state_dict={}), **SMALL)


@pytest.mark.parametrize("kind", ["official", "Hub, folder", "Hub, shard index", "ours"])
def test_hooks_of_timm(kind, files, weights):
    model = new()
    model.load_pretrained(str(files(kind)))
    assert_equal(model.state_dict(), weights)
    model = new()
    timm.models.load_pretrained(model, dict(file=str(files(kind)), custom_load=True))
    assert_equal(model.state_dict(), weights)
    with pytest.raises(ValueError, match="prefix must be empty"):
        model.load_pretrained(str(files(kind)), "backbone.")


def test_model_built_without_timm(files, weights):
    model = InternImage(**SCALED)
    model.load_pretrained(files("official"))
    assert_equal(model.state_dict(), weights)
    assert_refused(InternImage(**SCALED, num_classes=5), files("ours"), "create the model with num_classes=1000")


def test_url(files, weights, tmp_path):
    overlay = dict(url=files("Hub").as_uri())
    arguments = dict(pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path), **SCALED)
    # the tag of tiny has a repository, which gives way to what was asked for
    for name in ("internimage_atto", "internimage_tiny.ogvl_in1k"):
        assert_equal(timm.create_model(name, pretrained=True, **arguments).state_dict(), weights)
    overlay["url"] = (tmp_path / "missing.pth").as_uri()
    with pytest.raises(hub.DownloadError, match="missing.pth could not be downloaded"):
        timm.create_model("internimage_atto", pretrained=True, **arguments)


def test_tag_without_weights():
    small = dict(SMALL, layer_scale=None, stage3_post_norm_blocks=())
    for name in ("internimage_huge.ogvl_joint_in22k_ft_in1k_384", "internimage_atto.untrained"):
        with pytest.raises(CheckpointError, match=f"no weights were released for '{name}'.*pretrained=False"):
            create(None, name, **small)


# ---- the Hub, without a network; test_hub.py has the downloads


TINY, TINY_REPO = "internimage_tiny.ogvl_in1k", PUBLISHED["internimage_tiny.ogvl_in1k"].hub_id
TINY_PTH = "internimage_t_1k_224.pth"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_offline_with_an_empty_cache_says_what_to_set(offline, tmp_path):
    with pytest.raises(hub.DownloadError) as error:
        create(name=TINY, cache_dir=str(tmp_path))
    for part in (TINY_REPO, "HF_HUB_OFFLINE", "HF_ENDPOINT", "pretrained_cfg_overlay=dict(file=PATH)", TINY_PTH):
        assert part in str(error.value)
    assert "--checkpoint FILE" in str(error.value)  # the command line's words for the same


def test_offline_from_the_cache(offline, tmp_path, monkeypatch):
    """As huggingface_hub lays it out: a model of one's own behind `hf-hub:`, a revision, shards."""
    weights = filled(num_classes=7)
    model = new(num_classes=7)
    repository = tmp_path / "models--me--mine"
    snapshot = repository / "snapshots" / ("a" * 40)
    timm.models.save_for_hf(model, snapshot, safe_serialization=True)
    (snapshot / "model.safetensors").unlink()
    formats.save_index(snapshot, weights)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text("a" * 40)
    loaded = timm.create_model("hf-hub:me/mine@v2", pretrained=True, cache_dir=str(tmp_path))
    assert_equal(loaded.state_dict(), weights)
    assert json.loads((snapshot / "config.json").read_text())["num_classes"] == loaded.num_classes == 7
