# SPDX-License-Identifier: MIT
"""`internimage benchmark deform`: that it runs, its ratios, and its refusal to time what computes something else."""

import csv

import pytest
import torch

from internimage.benchmark import deform
from internimage.benchmark.contender import Contender
from internimage.benchmark.models import COLUMNS
from internimage.benchmark.timing import BenchmarkError, Clock, Times, facts
from internimage.cli import main
from internimage.layers.deform_conv import DeformConv

SMALL = deform.Layer(8, 4, 2, 3)


def test_it_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deform, "MODEL", "dcnv2_resnet18")  # faster to build
    file = tmp_path / "deform.csv"
    arguments = ["--quick", "--threads", "1", "--no-memory", "--csv", str(file)]
    assert main(["benchmark", "deform", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "torchvision / ours" in printed and "dcnv2_resnet18 / dcnv2_resnet18 on torchvision" in printed
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == COLUMNS
    assert {row["what"].partition(":")[0] for row in rows} == {
        *("forward", "forward+backward", "sampling", "product", "inference", "training step")
    }
    assert all(float(row["value"]) > 0 for row in rows if row["unit"] == "ms")


def test_ratios():
    """Of torchvision's faster memory format; its sampling is what its forward pass takes besides the product."""
    functions = deform.contenders(1, [SMALL])
    milliseconds = {
        ("forward", "ours", "fp32", "default"): 4,
        ("forward", "ours", "fp32", "channels_last"): 2,
        ("forward", "torchvision", "fp32", "default"): 10,
        ("forward", "torchvision", "fp32", "channels_last"): 8,
        ("forward+backward", "ours", "fp32", "default"): 5,
        ("forward+backward", "ours", "fp32", "channels_last"): 4,
        ("forward+backward", "torchvision", "fp32", "default"): 20,
        ("forward+backward", "torchvision", "fp32", "channels_last"): 30,
        ("forward", "ours", "bf16", "channels_last"): 1,
        ("sampling", "ours", "fp32", "channels_last"): 0.5,
        ("product", "torch", "fp32", "channels_last"): 1,
    }
    assert {key[1:] for key in functions} == set(milliseconds)
    times: Times[deform.Key] = Times(Clock("cpu", 1), rounds=1)
    times.seconds = {(SMALL, *kind): [value / 1e3] for kind, value in milliseconds.items()}
    rows = deform.rows(times, 1, facts(times.clock, times))
    found = {
        (row["what"], row["who"], row["memory_format"]): row["value"]
        for row in rows
        if row["of"] == "min" and row["unit"] == "x" and row["what"].endswith(SMALL.name)
    }
    assert found == {
        (f"forward: {SMALL.name}", "torchvision / ours", "default"): 2,
        (f"forward: {SMALL.name}", "torchvision / ours", "channels_last"): 4,
        (f"forward+backward: {SMALL.name}", "torchvision / ours", "default"): 4,
        (f"forward+backward: {SMALL.name}", "torchvision / ours", "channels_last"): 5,
        (f"sampling: {SMALL.name}", "torchvision / ours", "channels_last"): 14,
        (f"forward: {SMALL.name}", "ours fp32 / ours bf16", "channels_last"): 2,
    }
    last = [row for row in rows if row["memory_format"] == "channels_last" and row["dtype"] == "fp32"]
    whole = {(row["what"], row["who"]): row["value"] for row in last}
    assert whole["forward: all", "ours"] == 3 * 2  # of three such layers


def test_the_layers_are_those_of_the_model():
    model = Contender(deform.MODEL).build()
    seen = []
    for module in model.modules():
        if isinstance(module, DeformConv):
            module.register_forward_hook(
                lambda layer, inputs, output: seen.append((layer.in_channels, output.shape[2], layer.stride[0]))
            )
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    expected = [(layer.channels, layer.side, layer.stride) for layer in deform.LAYERS for _ in range(layer.count)]
    assert sorted(seen) == sorted(expected)


def test_the_model_on_torchvision_computes_the_same():
    """With offsets that are not zero, so that the operators differ if one is wrong."""
    images = Contender(deform.MODEL, img_size=64).images(2)
    with torch.inference_mode():
        ours, peer = (Contender(deform.MODEL, on_torchvision=peer).build()(images) for peer in (False, True))
    assert not Contender(deform.MODEL, on_torchvision=True).ours
    torch.testing.assert_close(ours, peer, rtol=0, atol=1e-4 * ours.abs().max().item())  # 50 layers of float32


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    right = deform.torchvision_core
    monkeypatch.setattr(deform, "torchvision_core", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(BenchmarkError, match="torchvision, default, 8 channels.* output deviates from ours by 1.0e-02"):
        deform.contenders(1, [SMALL])
