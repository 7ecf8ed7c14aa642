# SPDX-License-Identifier: MIT
"""`internimage analyze`, as a user calls it: what it writes and prints, and what it says to bad input."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_data_config

from internimage.analysis import Logit, Position, effective_receptive_field, map_of, predicted_class
from internimage.analysis.study import VIEWS
from internimage.cli import main, tables
from internimage.data.datasets import EvaluationTransform
from internimage.engine.create import create_model, data_config
from internimage.models.timm_folder import save_model

CLASSES = ["cat", "fox", "owl & <co>"]
QUICK = ("--budget", "30", "--cell", "16", "--projections", "2")


def save(folder, name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **arguments)
    for module in model.modules():
        if hasattr(module, "offset") and isinstance(module.offset, torch.nn.Linear):
            torch.nn.init.normal_(module.offset.weight, std=0.05)
    data = data_config(model, 64, 1.0)
    folder.mkdir()
    save_model(model, folder, CLASSES, data)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "mine", "internimage_atto")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "plain", "resnet10t")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """96 x 64: the model's 64 x 64 are columns 16 to 79."""
    path = tmp_path_factory.mktemp("images") / "photo.png"
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    coarse.resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


def options_of(parts):
    return [option for part in parts for option in getattr(part, "options", (part,))]


def fails(capsys, *arguments, status=2):
    """The only line that a command prints which must fail."""
    try:
        code = main(["analyze", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == status and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("internimage analyze: error: ")
    return line


def analyze(capsys, *arguments):
    assert main(["analyze", *map(str, arguments)]) == 0
    return capsys.readouterr()


def test_the_views_of_the_command_are_those_of_the_package():
    """The table of options must not import torch, so it has names of its own."""
    (option,) = [each for each in options_of(tables.ANALYZE) if each.name == "--views"]
    assert option.kind.allowed == VIEWS


def test_the_predicted_class_and_the_middle_by_default(run, photo, tmp_path, capsys):
    folder = tmp_path / "result"
    shown = analyze(capsys, photo, "--model", run, "--output", folder, *QUICK)
    lines = shown.out.splitlines()
    assert lines[0] == "mine, 64 x 64 pixels" and lines[-1] == f"page: {folder / 'index.html'}"
    assert re.fullmatch(r"  logit of class \d \(.*\)", lines[1])
    assert lines[5] == "  levels.3 at column 1, row 1 (pixel 64,48 of the image)"
    for i in (1, 5):
        assert lines[i + 1].startswith("    receptive field: 50 % of the energy in a square of ")
        assert lines[i + 2].startswith("    effective points: 6 layers; strongest in levels.")
        assert lines[i + 3].startswith("    saliency region: ")
    names = {path.name for path in folder.iterdir()}
    assert {"index.html", "views.npz", "image-model1.png", "erf-model1-node2.png"} <= names
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "cropped to 64 x 64, it shows columns 16 to 79 and rows 0 to 63" in text


def test_the_numbers_as_json_are_those_of_the_views(run, photo, tmp_path, capsys):
    at = "--at", "30,10", "--at", "70,60"
    shown = analyze(
        capsys, photo, "--model", run, "--output", tmp_path / "r", *QUICK, *at, "--layer", "3", "--class", "FOX",
        "--json", "--seed", "5", "--views", "erf"
    )  # fmt: skip
    result = json.loads(shown.out)
    assert result["page"] == str(tmp_path / "r" / "index.html")
    (model,) = result["models"]
    assert [node["node"] for node in model["nodes"]] == [
        "logit of class 1 (fox)", "levels.2 at column 0, row 0", "levels.2 at column 3, row 3",
    ]  # fmt: skip
    # pixel 30,10 is 14,10 of what the model sees, and its position there covers 0 to 15
    assert [(node["given_x"], node["given_y"]) for node in model["nodes"][1:]] == [(23.5, 7.5), (71.5, 55.5)]
    network = timm.create_model(f"local-dir:{run}", pretrained=True)
    config = resolve_data_config({}, model=network)
    with Image.open(photo) as image:
        pixels = EvaluationTransform(config)(image.convert("RGB"))
    stored = np.load(tmp_path / "r" / "views.npz")
    x, y = map_of(network, pixels, 3).from_image(70 - 16, 60)
    for j, node in ((1, Logit("fox")), (3, Position(3, x, y))):
        field = effective_receptive_field(network, pixels, node, 2, 5)
        found = stored[f"model1/node{j}/erf/sensitivity"]
        assert np.allclose(found, field.sensitivity, rtol=1e-5, atol=1e-7 * float(field.sensitivity.max()))
        assert "saliency" not in model["nodes"][j - 1]


def test_two_models_and_their_controls_side_by_side(run, plain, photo, tmp_path, capsys):
    """A control predicts for itself what its weights say, but is asked for the class of the trained model."""
    shown = analyze(
        capsys, photo, "--model", run, "--model", plain, "--control", "--output", tmp_path / "r", "--views", "erf",
        "--json", *QUICK
    )  # fmt: skip
    models = json.loads(shown.out)["models"]
    assert [model["model"] for model in models] == ["mine", "mine (untrained)", "plain", "plain (untrained)"]
    for trained, control in ((0, 1), (2, 3)):
        assert models[trained]["nodes"][0]["node"] == models[control]["nodes"][0]["node"]
        assert models[trained]["nodes"][0]["erf"] != models[control]["nodes"][0]["erf"]
    again = analyze(
        capsys, photo, "--model", run, "--control", "--output", tmp_path / "r", "--views", "erf", "--json", *QUICK
    )  # fmt: skip
    assert json.loads(again.out)["models"] == models[:2]  # the same seed, the same control
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "index.html", "views.npz", "image-model1.png", "image-model2.png",
        *(f"erf-model{i}-node{j}.png" for i in (1, 2) for j in (1, 2)),
    }  # fmt: skip


def test_a_control_is_asked_for_the_class_of_the_trained_model(run, photo, tmp_path, capsys):
    """New weights predict one class or another, by their seed."""
    own = set()
    for seed in range(4):
        shown = analyze(
            capsys, photo, "--model", run, "--control", "--output", tmp_path / "r", "--views", "erf", "--json",
            "--projections", "1", "--seed", seed,
        )  # fmt: skip
        trained, control = (model["nodes"][0]["node"] for model in json.loads(shown.out)["models"])
        assert trained == control
        torch.manual_seed(seed)
        untrained = create_model(str(run), pretrained=False)
        with Image.open(photo) as image:
            own.add(predicted_class(untrained, EvaluationTransform(data_config(untrained, 64, 1.0))(image)))
    assert len(own) > 1


def test_a_model_without_deformable_layers_has_the_other_views(run, plain, photo, tmp_path, capsys):
    shown = analyze(capsys, photo, "--model", plain, "--model", run, "--output", tmp_path / "r", "--json", *QUICK)
    assert "plain has no deformable layers, so there is no view of sampling points; --plain takes" in shown.err
    assert all(node.keys() >= {"erf", "saliency"} for node in json.loads(shown.out)["models"][0]["nodes"])
    line = fails(capsys, photo, "--model", plain, "--views", "erf,points", "--output", tmp_path / "n")
    assert "has no deformable layers" in line and "receptive field and of the saliency region work" in line
    assert not (tmp_path / "n").exists()
    more = analyze(
        capsys, photo, "--model", plain, "--plain", "--views", "points", "--json", "--output", tmp_path / "p"
    )
    points = json.loads(more.out)["models"][0]["nodes"][0]["points"]
    assert points and not any(layer["deformable"] for layer in points)


def test_an_image_as_the_fill_and_exact_projections(run, photo, tmp_path, capsys):
    Image.new("RGB", (10, 10), (255, 0, 0)).save(tmp_path / "red.png")
    shown = analyze(
        capsys, photo, "--model", run, "--fill", tmp_path / "red.png", "--projections", "exact", "--output",
        tmp_path / "r", "--json", "--budget", "20", "--cell", "32", "--bound", "0.5",
    )  # fmt: skip
    logit, position = json.loads(shown.out)["models"][0]["nodes"]
    assert logit["saliency"]["fill"] == "image" and logit["saliency"]["bound"] == 0.5
    assert position["erf"]["projections"] is None


def test_gray_models(photo, tmp_path, capsys):
    save_folder = save(tmp_path / "gray", "internimage_atto", in_chans=1)
    shown = analyze(capsys, photo, "--model", save_folder, "--output", tmp_path / "r", "--json", *QUICK)
    assert json.loads(shown.out)["models"][0]["width"] == 64


@pytest.mark.parametrize(
    "options, words",
    [
        (["--at", "100,5"], "the pixel 100,5 is outside the image of 96 x 64 pixels"),
        (
            ["--at", "5,5"],
            "the pixel 5,5 is in the part that the crop removes: the model sees columns 16 to 79 and rows",
        ),
        (["--at", "5"], "argument --at: must be X,Y: a column and a row of the image, from 0, got '5'"),
        (["--layer", "levels.9"], "'internimage_atto' has no layer 'levels.9'"),
        (["--layer", "7"], "has stages 1 to 4"),
        (["--layer", "1", "--layer", "2"], "--layer is given once, or once for each model, got 2"),
        (["--class", "cut"], "'internimage_atto' has no class 'cut'; near ones are cat"),
        (["--class", "3"], "has classes 0 to 2, got 3"),
        (["--bound", "0"], "argument --bound: must be a number above 0 and below 1, got '0'"),
        (["--bound", "1"], "argument --bound: must be a number above 0 and below 1, got '1'"),
        (["--views", "erf,cam"], "argument --views: must be some of erf,points,saliency, separated by commas"),
        (["--fill", "none.png"], "'none.png' cannot be read"),
        (["--projections", "0"], "argument --projections: must be 'exact' or a whole number from 1"),
    ],
)
def test_bad_input_is_one_line_and_no_folder(run, photo, tmp_path, capsys, options, words):
    line = fails(capsys, photo, "--model", run, "--output", tmp_path / "r", *options)
    assert words in line
    assert not (tmp_path / "r").exists()


def test_images_folders_and_models_that_do_not_fit(run, photo, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    for path, words in (
        (tmp_path / "none.png", "none.png' cannot be read"),
        (tmp_path / "text.png", "is not an image"),
    ):
        assert words in fails(capsys, path, "--model", run, "--output", tmp_path / "r")
    somebodys = tmp_path / "photos"
    somebodys.mkdir()
    (somebodys / "me.jpg").write_bytes(b"mine")
    line = fails(capsys, photo, "--model", run, "--output", somebodys)
    assert "is not empty, and contains 'me.jpg': name another" in line
    assert [path.name for path in somebodys.iterdir()] == ["me.jpg"]
    assert "--model has" in fails(capsys, photo, "--model", run, "--model", run, "--output", tmp_path / "r")
    line = fails(capsys, photo, "--model", run, "--model", "resnet10t", "--checkpoint", run, "--output", tmp_path / "r")
    assert "--checkpoint is for a single --model" in line
    assert not (tmp_path / "r").exists()


def test_weights_that_are_not_finite_are_named_instead_of_drawn(run, photo, tmp_path, capsys):
    network = timm.create_model(f"local-dir:{run}", pretrained=True)
    state = network.state_dict()
    state["levels.0.blocks.0.mlp.fc1.bias"][0] = float("nan")
    save_file(state, tmp_path / "broken.safetensors")
    arguments = [
        "--model",
        "internimage_atto",
        "--checkpoint",
        str(tmp_path / "broken.safetensors"),
        "--img-size",
        "64",
    ]
    assert main(["analyze", str(photo), *arguments, "--output", str(tmp_path / "r")]) == 1
    warning, line = capsys.readouterr().err.splitlines()  # the reader of weights warns too
    assert "NaN or infinity in 1 tensors" in warning
    assert "have NaN or infinity (levels.0.blocks.0.mlp.fc1.bias): a view would mean nothing" in line
    assert not (tmp_path / "r").exists()


def test_an_interrupt_leaves_no_half_page(run, photo, tmp_path, capsys, monkeypatch):
    from internimage.analysis import study as studies

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "saliency_region", interrupted)
    assert main(["analyze", str(photo), "--model", str(run), "--output", str(tmp_path / "r"), *QUICK]) == 130
    assert capsys.readouterr().err == "interrupted\n" and not (tmp_path / "r").exists()
