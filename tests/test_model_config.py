# SPDX-License-Identifier: MIT
"""A model folder's config.json may come from anywhere: whatever is wrong in it is one line, on every path."""

import copy
import dataclasses
import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from internimage.cli import main
from internimage.convert.convert import check_folder
from internimage.engine.create import create_model, data_config
from internimage.errors import CheckpointError, UserError
from internimage.models.attributes import label_names
from internimage.models.families import family_of
from internimage.models.model_config import ModelConfigError, find_model_config, read_model_config

SMALL = dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 1, 2, 4), num_classes=3)
LABELS = dict(label_names=["a", "b", "c"])


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder as finetune writes it."""
    folder = tmp_path_factory.mktemp("good")
    save_for_hf(timm.create_model("internimage_atto", **SMALL), folder, dict(LABELS), safe_serialization=True)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def assert_one_line(error, message: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 500
    assert message in text


# whole files, and what is said of them
FILES = {
    "empty": (b"", "is not JSON"),
    "not JSON": (b"{architecture: internimage_atto}", "is not JSON"),
    "cut": (b'{"architecture": "internimage_at', "is not JSON"),
    "pickle": (b"\x80\x02}q\x00.", "is not JSON: it is not UTF-8 text"),
    "UTF-16": ('{"architecture": "x"}'.encode("utf-16"), "is not JSON"),
    "list": (b"[1, 2]", "must hold a JSON object, got a list"),
    "string": (b'"internimage_atto"', "must hold a JSON object, got a str"),
    "null": (b"null", "must hold a JSON object, got a NoneType"),
    "number": (b"1" * 5000, "a number of 400 digits or more"),
    "NaN": (b'{"architecture": "internimage_atto", "x": NaN}', "NaN is not a number in JSON"),
    "nested deeply": (b'{"architecture": ' + b"[" * 100_000, "nested too deeply"),
    "nested deeply, and closed": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "nested less deeply": (b'{"architecture": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply"),
    "lists without end": (b'{"x": [' + b"[]," * 10**6 + b"0]}", "too many lists and objects"),
    "byte order mark": (b'\xef\xbb\xbf{"architecture": "internimage_atto"}', "begins with a byte order mark"),
    "a key twice": (
        b'{"architecture": "internimage_atto", "num_classes": 3, "num_classes": 4}',
        "the key 'num_classes' occurs twice in an object",
    ),
    "too large": (b" " * (16 * 2**20 + 1), "larger than 16 MiB"),
}

# changed values: None removes one, ... is for null
VALUES = {
    "architecture a number": (dict(architecture=5), "architecture must be a model's name, got 5"),
    "architecture a list": (dict(architecture=["internimage_atto"]), "architecture must be a model's name"),
    "architecture unknown": (dict(architecture="internimage_atta"), "did you mean 'internimage_atto'?"),
    "architecture a path": (dict(architecture="../../etc/passwd"), "has an architecture '../../etc/passwd'"),
    "architecture of many lines": (dict(architecture="a\nb" * 500), "has an architecture 'a\\nb"),
    "architecture null": (dict(architecture=...), "architecture must be a model's name, got None"),
    "arguments a list": (dict(model_args=["channels", 8]), "model_args must be an object"),
    "arguments null": (dict(model_args=...), "model_args must be an object, got None"),
    "argument unknown": (dict(model_args=dict(chanels=8)), "'chanels', which InternImage does not take; did you mean"),
    "argument of timm": (dict(model_args=dict(pretrained=False)), "'pretrained', which is no argument of a model"),
    "argument for other weights": (
        dict(model_args=dict(pretrained_cfg_overlay=dict(file="/etc/passwd"))), "is no argument of a model",
    ),
    "argument device": (dict(model_args=dict(device="meta")), "'device', which is no argument of a model"),
    "depths of a billion": (dict(model_args=dict(SMALL, depths=[10**9, 1, 1, 1])), "'depths' of model_args is too"),
    "channels of a trillion": (dict(model_args=dict(SMALL, channels=10**12)), "'channels' of model_args is too large"),
    "channels infinite": (dict(model_args=dict(SMALL, channels=1e400)), "not a number in JSON"),
    "classes in words": (dict(num_classes="ten"), "num_classes must be a whole number from 0 to 10000000, got 'ten'"),
    "classes negative": (dict(num_classes=-1), "num_classes must be a whole number"),
    "classes huge": (dict(num_classes=10**12), "num_classes must be a whole number"),
    "classes a fraction": (dict(num_classes=2.5), "num_classes must be a whole number"),
    "classes of the arguments": (dict(model_args=dict(num_classes="x")), "num_classes of model_args must be a whole"),
    "image channels": (dict(model_args=dict(in_chans=0)), "in_chans of model_args must be a whole number from 1"),
    "preprocessing a list": (dict(pretrained_cfg=[]), "pretrained_cfg must be an object"),
    "preprocessing null": (dict(pretrained_cfg=...), "pretrained_cfg must be an object, got None"),
    "preprocessing unknown": (dict(pretrained_cfg=dict(colour=1)), "pretrained_cfg has 'colour', which timm"),
    "weights in it": (dict(pretrained_cfg=dict(state_dict={})), "pretrained_cfg holds a state_dict"),
    "labels a string": (dict(label_names="abc"), "label_names must be a list of names, got 'abc'"),
    "labels numbers": (dict(label_names=[1, 2, 3]), "label_names must be a list of names"),
    "labels too few": (dict(label_names=["a", "b"]), "label_names has 2 names, and num_classes is 3"),
    "labels by words": (dict(label_names={"a": "b"}), "the keys of label_names must be indices of classes"),
    "descriptions a list": (dict(label_descriptions=["a"]), "label_descriptions must be an object of texts"),
    "descriptions numbers": (dict(label_descriptions={"a": 1}), "label_descriptions must be an object of texts"),
    "size of two numbers": (
        dict(pretrained_cfg=dict(input_size=[3, 32])), "input_size must be [channels, height, width], got [3, 32]"
    ),
    "size a number": (dict(pretrained_cfg=dict(input_size=224)), "input_size must be [channels, height, width]"),
    "size negative": (dict(pretrained_cfg=dict(input_size=[3, -32, 32])), "height and width of input_size"),
    "size zero": (dict(pretrained_cfg=dict(input_size=[3, 0, 0])), "height and width of input_size"),
    "size in words": (dict(pretrained_cfg=dict(input_size=["3", "32", "32"])), "channels of input_size must"),
    "size huge": (dict(pretrained_cfg=dict(input_size=[3, 10**9, 32])), "height and width of input_size"),
    "mean of two": (dict(pretrained_cfg=dict(mean=[0.5, 0.5])), "mean must have a number for each of 3 channels"),
    "mean in words": (dict(pretrained_cfg=dict(mean=["a", "b", "c"])), "mean must be a list of numbers"),
    "mean a number": (dict(pretrained_cfg=dict(mean=0.5)), "mean must be a list of numbers, got 0.5"),
    "deviation zero": (dict(pretrained_cfg=dict(std=[0.2, 0, 0.2])), "std must be above 0"),
    "deviation negative": (dict(pretrained_cfg=dict(std=[-1, 1, 1])), "std must be above 0"),
    "crop": (dict(pretrained_cfg=dict(crop_pct=0)), "crop_pct must be a number above 0"),
    "crop in words": (dict(pretrained_cfg=dict(crop_pct="all")), "crop_pct must be a number above 0"),
    "crop mode": (dict(pretrained_cfg=dict(crop_mode="round")), "crop_mode must be center, squash or border"),
    "interpolation": (dict(pretrained_cfg=dict(interpolation="best")), "interpolation must be such as 'bicubic'"),
    "interpolation a list": (dict(pretrained_cfg=dict(interpolation=[1])), "interpolation must be such as 'bicubic'"),
    "classifier a number": (dict(pretrained_cfg=dict(classifier=5)), "classifier must be a layer's name, got 5"),
    "classifier a list of numbers": (dict(pretrained_cfg=dict(classifier=[5])), "classifier must be a layer's name"),
    "size null": (dict(pretrained_cfg=dict(input_size=None)), "input_size must not be null; omit it"),
    "pooling size": (dict(pretrained_cfg=dict(pool_size=["a", 1])), "height and width of pool_size must be"),
    "license a list": (dict(pretrained_cfg=dict(license=["mit"])), "license must be text"),
    "tag a number": (dict(pretrained_cfg=dict(tag=3)), "tag must be text, got 3"),
    "label offset": (dict(pretrained_cfg=dict(label_offset=-1)), "label_offset must be a whole number from 0"),
    "fixed size in words": (dict(pretrained_cfg=dict(fixed_input_size="no")), "fixed_input_size must be true or false"),
    "fixed size": (dict(pretrained_cfg=dict(fixed_input_size=True)), "fixed_input_size must be false"),
    "features": (dict(model_args=dict(features_only=True)), "'features_only', which InternImage does not take"),
    "averages": (dict(model_args=dict(use_ema="yes")), "use_ema of model_args must be true or false, got 'yes'"),
    "head": (dict(model_args=dict(head_from_22k=[1])), "head_from_22k of model_args must be true, false or a list"),
    "argument of an unreadable name": (dict(model_args={"\x1b[2J": 1}), r"'\x1b[2J', which InternImage does not take"),
}  # fmt: skip

# of a type and size that the reader lets through, and the model does not
ARGUMENTS = {
    "channels in words": (dict(SMALL, channels="many"), "channels must be a whole number"),
    "groups": (dict(SMALL, groups=[1, 1, 1, 3]), "groups must divide the channels"),
    "activation": (dict(SMALL, act_layer="nope"), "act_layer must be timm's name of an activation"),
    "kernel": (dict(SMALL, dw_kernel_size="x"), "dw_kernel_size"),
    "pooling": (dict(SMALL, global_pool={}), "global_pool must be one of"),
    "blocks of all stages": (dict(SMALL, depths=[999, 999, 1, 1]), "depths must be at most 1000 blocks together"),
    "norms": (
        dict(SMALL, depths=[1, 1, 9, 1], stage3_post_norm_blocks=[3, 3]),
        "stage3_post_norm_blocks must name each block once",
    ),
}


def change(folder: Path, values: dict) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in copy.deepcopy(values).items():
        if isinstance(value, dict) and value and key == "pretrained_cfg":
            value = {**content[key], **value}
        content[key] = None if value is ... else value
    path.write_text(json.dumps(content))


def assert_refused(folder: Path, image: Path, capsys, message: str, push: str | None = None) -> None:
    """By all that take a folder, in one line and with nothing written."""
    for name in (str(folder), f"local-dir:{folder}"):
        with pytest.raises(CheckpointError) as error:
            create_model(name)
        assert_one_line(error.value, message)
    with pytest.raises(CheckpointError) as error:
        create_model("internimage_atto", str(folder))
    assert_one_line(error.value, message)
    with pytest.raises(CheckpointError) as error:
        check_folder(folder)
    assert_one_line(error.value, message)
    out = folder.parent / "out"
    for command in (["convert", folder, out], ["predict", image, "--model", folder], ["push", folder, "me/mine"]):
        assert main([str(part) for part in command]) == 2
        err = capsys.readouterr().err
        assert_one_line(err.removesuffix("\n"), message)
        assert f"internimage {command[0]}: error: " in err
    assert not out.exists()


@pytest.mark.parametrize("what", FILES)
def test_file_that_is_no_configuration(what, folder, image, capsys):
    content, message = FILES[what]
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, image, capsys, message)


@pytest.mark.parametrize("what", VALUES)
def test_value_that_cannot_be_used(what, folder, image, capsys):
    values, message = VALUES[what]
    change(folder, values)
    if what in ("architecture a number", "classes in words", "size of two numbers", "argument unknown"):
        assert_refused(folder, image, capsys, message)
        return
    with pytest.raises(ModelConfigError) as error:
        read_model_config(folder)
    assert_one_line(error.value, message)


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_build_no_model(what, folder, image, capsys):
    arguments, message = ARGUMENTS[what]
    change(folder, dict(model_args=arguments))
    for command in (["convert", folder, folder.parent / "out"], ["predict", image, "--model", folder],
                    ["push", folder, "me/mine"]):  # fmt: skip
        assert main([str(part) for part in command]) == 2
        assert_one_line(capsys.readouterr().err.removesuffix("\n"), message)


PIPE = pytest.param("a pipe", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes"))


@pytest.mark.parametrize("what", ["a folder", PIPE, "a broken link", "unreadable"])
def test_config_that_is_no_file(what, folder, image, capsys):
    path = folder / "config.json"
    content = path.read_bytes()
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "unreadable":
        path.write_bytes(content)
        path.chmod(0)
        if os.access(path, os.R_OK):
            return  # root reads everything
    else:
        path.symlink_to("nowhere")
    message = {"a broken link": "no config.json", "unreadable": "cannot be read"}.get(what, "not a regular file")
    with pytest.raises(ModelConfigError) as error:
        read_model_config(folder)
    assert_one_line(error.value, message)
    assert main(["predict", str(image), "--model", str(folder)]) == 2
    assert_one_line(capsys.readouterr().err.removesuffix("\n"), message)


def test_good_configurations_are_read(folder):
    config = read_model_config(folder)
    assert config.architecture == "internimage_atto" and config.ours
    assert config.pretrained_cfg["num_classes"] == 3 and config.pretrained_cfg["label_names"] == ["a", "b", "c"]
    change(folder, dict(architecture="internimage_atto.untrained"))
    assert read_model_config(folder).architecture == "internimage_atto"
    content = json.loads((folder / "config.json").read_text())
    old = {"architecture": "resnet18", "num_features": 512, **content["pretrained_cfg"]}
    (folder / "config.json").write_text(json.dumps(old))  # as older versions of timm wrote it
    assert not read_model_config(folder).ours
    old["mean"], old["std"], old["input_size"] = [0.5], [0.5], [1, 32, 48]
    (folder / "config.json").write_text(json.dumps(old))
    assert read_model_config(folder).pretrained_cfg["input_size"] == [1, 32, 48]


@pytest.mark.parametrize("name", ["internimage_tiny", "internimage_giant", "resnet18", "vit_tiny_patch16_224",
                                  "convnext_atto", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224",
                                  "mobilenetv3_small_050", "tf_efficientnet_b0", "beit_base_patch16_224"])  # fmt: skip
def test_what_timm_writes_is_read(name, tmp_path):
    timm.models._hub.save_config_for_hf(timm.create_model(name, device="meta"), tmp_path / "config.json")
    assert read_model_config(tmp_path).architecture == name


def test_configuration_of_transformers(folder, image, capsys):
    """Beside official weights; they load by their names, and convert finds the model out from the shapes."""
    (folder / "config.json").write_text('{"model_type": "internimage", "architectures": ["InternImage"]}')
    assert find_model_config(folder) is None
    with pytest.raises(ModelConfigError, match="not timm's.*transformers.*load by their names"):
        create_model(str(folder))
    with pytest.raises(CheckpointError, match="no folder with timm's config.json"):
        check_folder(folder)
    model = create_model("internimage_atto", str(folder), **{k: v for k, v in SMALL.items() if k != "num_classes"})
    assert model.num_classes == 3  # the weights alone


def test_damaged_config_beside_a_file_of_weights_is_ignored_with_a_warning(folder, tmp_path, capsys, caplog):
    (folder / "config.json").write_text("{")
    arguments = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if key != "num_classes"]
    command = ["convert", str(folder / "model.safetensors"), str(tmp_path / "out"), "--model", "internimage_atto"]
    assert main([*command, "--model-kwargs", *arguments]) == 0
    assert main([*command[:2], str(tmp_path / "second")]) == 2  # no model is named, and its size is not a released one
    assert "is of no released size" in capsys.readouterr().err
    assert "is not JSON" in caplog.text and "ignored" in caplog.text


def test_folder_of_another_architecture_is_neither_converted_nor_pushed(tmp_path, capsys):
    save_for_hf(timm.create_model("resnet10t", num_classes=2), tmp_path / "m", safe_serialization=True)
    for command in (["convert", tmp_path / "m", tmp_path / "out"], ["push", tmp_path / "m", "me/mine"]):
        assert main([str(part) for part in command]) == 2
        err = capsys.readouterr().err
        assert "resnet10t" in err or "holds no InternImage" in err
        assert err.count("\n") == 1
    torch.save(timm.create_model("internimage_atto", **SMALL).state_dict(), tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "out"), "--model", "resnet18"]) == 2
    assert "only InternImage and deformable ResNet can be converted" in capsys.readouterr().err


# ---- every value everywhere


def nested(depth: int, value: object = 0) -> object:
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = [
    None, True, False, 0, -1, 2, 1.5, 1e300, -1e300, 1e-320, 10**9, -(10**9), 10**30, 10**399, "", "x", "a\nb\x1b[31m",
    "\ud800", "\0", "nan", "x" * 10**5, [], [1], [1] * 3, [1] * 4, [-1] * 4, [10**9] * 4, [True] * 4, ["x"] * 4,
    [1e300] * 4, [None] * 3, [0] * 10**5, {}, {"a": 1}, {"0": "a", "1": "b", "2": "c"}, [{}], nested(20), nested(300),
]  # fmt: skip


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values of a JSON document."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def replaced(content: dict, path: tuple, value: object) -> object:
    if not path:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def corpus(content: dict) -> list[tuple]:
    """Everywhere in a config.json, and where it has nothing."""
    more = [("labels",), ("model_args", "device"), ("model_args", "x"), ("pretrained_cfg", "x")]
    more += [("model_args", name) for name in family_of("internimage_atto").arguments]
    more += [("pretrained_cfg", field.name) for field in dataclasses.fields(timm.models.PretrainedCfg)]
    return sorted({*places(content), *more}, key=str)


def write_json(folder: Path, content: object) -> None:
    limits = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        (folder / "config.json").write_text(json.dumps(content))
    finally:
        sys.setrecursionlimit(limits)


def loads(folder: Path) -> None:
    model = create_model(str(folder))
    data_config(model)
    label_names(model)


def assert_loads_or_is_refused(folder: Path, path: tuple, value: object) -> None:
    """Also where timm has read the file, as far as it can."""
    before = ascii((path, value))[:200]
    try:
        loads(folder)
        return
    except UserError as error:
        message = str(error)
        assert len(message) < 700 or "nothing was loaded" in message, before
        assert message.replace("\n", "").isprintable(), before
    if value == nested(300):
        return  # of which timm's own copies make a RecursionError
    try:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    except ValueError as error:  # of the constructor or our reader's checks, which are ValueErrors as well
        assert "\n" not in str(error), before
    except CheckpointError as error:
        assert "does not fit the model" in str(error) or "\n" not in str(error), before
    except (RuntimeError, TypeError, AttributeError, AssertionError, KeyError, IndexError) as error:  # timm's own
        frames = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        assert not any("internimage" in parts for parts in frames[1:] if "tests" not in parts), before


def check_corpus(folder: Path, share: int) -> int:
    content = json.loads((folder / "config.json").read_text())
    cases = [(path, value) for path in corpus(content) for value in HOSTILE]
    random.Random(0).shuffle(cases)
    for path, value in cases[::share]:
        write_json(folder, replaced(content, path, value))
        assert_loads_or_is_refused(folder, path, value)
    return len(cases)


def test_some_values_somewhere(folder):
    assert check_corpus(folder, 20) > 2000


@pytest.mark.slow
def test_every_value_everywhere(folder):
    check_corpus(folder, 1)


def test_what_timm_has_read_is_checked_too(folder):
    """timm.create_model("local-dir:...") and transformers read the file themselves and call this package."""
    for values, message in (
        (dict(pretrained_cfg=dict(mean=[float("nan")] * 3)), "mean must be a list of numbers"),
        (dict(pretrained_cfg=dict(colour=1)), "pretrained_cfg has 'colour'"),
        (dict(label_names={"a": "b"}), "the keys of label_names must be indices"),
        (dict(model_args=dict(SMALL, device=[1])), "'device', which is no argument of a model"),
        (dict(model_args=dict(SMALL, features_only=True)), "'features_only', which InternImage does not take"),
        (dict(model_args=dict(SMALL, depths=[10**9, 1, 1, 1])), "'depths' of model_args is too large"),
    ):
        before = (folder / "config.json").read_text()
        change(folder, values)
        for pretrained in (True, False):
            with pytest.raises(ModelConfigError) as error:
                timm.create_model(f"local-dir:{folder}", pretrained=pretrained)
            assert_one_line(error.value, message)
            assert str(folder) in str(error.value)
        (folder / "config.json").write_text(before)


def test_building_on_meta_computes_no_initial_values():
    """So that what a config.json asks for is soon compared with the weights, however deep it is."""
    with torch.utils._python_dispatch._disable_current_modes():
        calls = []

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                calls.append(str(function))
                return function(*args, **(kwargs or {}))

        with Count():
            timm.create_model("internimage_atto", device="meta")
    assert not [name for name in calls if "erfinv" in name or "clamp" in name]
