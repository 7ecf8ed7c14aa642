# SPDX-License-Identifier: MIT
"""Outputs that are not finite: neither accuracy nor predictions are computed from them."""

import csv
import json
import logging

import pytest
import timm
import torch
from pictures import COLORS, CONFIG, ByColor, command, count, three, write_model
from PIL import Image

from internimage.cli import main
from internimage.data.datasets import open_dataset
from internimage.engine.finite import NotFiniteError
from internimage.tasks.classification.evaluate import evaluate
from internimage.tasks.classification.predict import predict


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    """The command line's log handler keeps the stderr of the test that created it."""
    monkeypatch.setattr(logging.getLogger("internimage"), "handlers", [])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


class Overflowing(ByColor):
    """Infinite on white images."""

    def forward(self, x):
        return super().forward(x) / (x.mean((1, 2, 3)) < 0.99)[:, None]


def test_outputs_that_are_not_finite_are_not_counted(tmp_path):
    three(tmp_path / "data")
    Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "data" / "red" / "white.png")
    dataset = open_dataset(tmp_path / "data")
    for flip in (False, True):
        with pytest.raises(NotFiniteError, match="^the model's outputs are not finite, though its weights are$"):
            count(dataset, Overflowing(), flip=flip)
    with pytest.raises(NotFiniteError, match="bfloat16 overflows, try float32"):
        count(dataset, Overflowing(), dtype=torch.bfloat16)
    broken = ByColor()
    broken.weight.data[1, 1] = float("nan")
    with pytest.raises(NotFiniteError, match=r"^the model's weights are not finite \(weight\)$"):
        count(dataset, broken)
    large = ByColor()
    large.weight.data *= 1e5
    with pytest.raises(NotFiniteError, match="float16 overflows, try bfloat16 or float32"):
        count(dataset, large, dtype=torch.float16)


def test_a_probability_of_0_has_a_finite_loss_with_flips(tmp_path):
    three(tmp_path)
    model = ByColor()
    model.weight.data *= 100
    model.weight.data[[0, 1]] = model.weight.data[[1, 0]]
    result = count(open_dataset(tmp_path), model, flip=True)
    assert 20 < result.loss < 100 and result.top1 == pytest.approx(100 / 3)


def test_a_validation_that_is_not_finite_ends_a_run_at_its_end(tmp_path, capsys, monkeypatch):
    """Earlier ones are reported, and their rows of the log have no accuracy: later steps may recover."""
    three(tmp_path / "train")
    three(tmp_path / "val", 1)
    outcomes = []

    def infinite_but_in_the_second(model, *arguments, **more):
        outcomes.append(None if len(outcomes) == 1 else NotFiniteError("infinite"))
        if outcomes[-1] is not None:
            raise outcomes[-1]
        return evaluate(model, *arguments, **more)

    messages = []
    monkeypatch.setattr("internimage.tasks.classification.task.evaluate", infinite_but_in_the_second)
    monkeypatch.setattr("internimage.engine.trainer.message", messages.append)
    arguments = [
        "img_size=32",
        "batch_size=6",
        "workers=0",
        "device=cpu",
        "pretrained=false",
        "epochs=3",
        "report=false",
    ]
    line = command(
        capsys, "finetune", f"data={tmp_path}", f"output={tmp_path}/out", "model=internimage_atto", *arguments, status=2
    )
    assert "training diverged: infinite after epoch 3" in line and messages == ["epoch 1 has no validation: infinite"]
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert not first.get("val_top1") and float(first["train_loss"]) > 0 and float(second["val_top1"]) >= 0
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_predict_continues_after_an_image_that_overflows():
    images = [(name, Image.new("RGB", (8, 8), color)) for name, color in {**COLORS, "white": (255,) * 3}.items()]
    images = [images[0], images[3], images[1]]
    failed = []
    predictions = list(predict(Overflowing(), images, CONFIG, failed=lambda name, problem: failed.append(name)))
    assert [prediction.labels[0] for prediction in predictions] == ["blue", "green"] and failed == ["white"]
    with pytest.raises(NotFiniteError):
        list(predict(Overflowing(), images, CONFIG))


def test_the_command_predicts_the_others_and_ends_with_1(tmp_path, capsys, monkeypatch):
    three(tmp_path, 1)
    Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "green" / "white.png")
    loaded = Overflowing(), CONFIG, torch.device("cpu"), torch.float32
    monkeypatch.setattr("internimage.cli.predict.load_model", lambda arguments: loaded)
    assert main(["predict", str(tmp_path), "--model", "any", "--json"]) == 1
    captured = capsys.readouterr()
    predictions = [json.loads(line) for line in captured.out.splitlines()]
    assert [prediction["classes"][0]["label"] for prediction in predictions] == ["blue", "green", "red"]
    problem = "the model's outputs are not finite, though its weights are"
    assert captured.err == f"internimage predict: error: '{tmp_path}/green/white.png': {problem}\n"


def test_commands_reject_weights_that_are_not_finite(tmp_path, capsys, model):
    three(tmp_path / "data", 1)
    state = timm.create_model(f"local-dir:{model}", pretrained=True).state_dict()
    state["head.bias"][1] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    arguments = ["--model", model, "--checkpoint", tmp_path / "nan.pth"]
    report = tmp_path / "report.json"
    line = command(
        capsys, "evaluate", *arguments, "--data", tmp_path / "data", "--workers", 0, "--json", report, status=1
    )
    assert "error: the model's weights are not finite (head.bias)" in line
    assert not report.exists()
    assert main(["predict", str(tmp_path / "data"), *map(str, arguments), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("error: the model's weights are not finite (head.bias)") == 1


def test_reports_are_valid_json(tmp_path, capsys, model):
    three(tmp_path / "data", 1)
    report, table = tmp_path / "report.json", tmp_path / "report.csv"
    arguments = ["--model", model, "--data", tmp_path / "data", "--workers", 0, "--flip"]
    command(capsys, "evaluate", *arguments, "--json", report, "--csv", table, "--per-class", status=0)

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(report.read_text(), parse_constant=constant)["images"] == 3
    (row,) = csv.DictReader(table.open())
    assert all(value not in ("nan", "inf") for value in row.values())
