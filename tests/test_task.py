# SPDX-License-Identifier: MIT
"""The engine trains a task that it has never heard of: tests/center_of_mass.py."""

import csv
import os
import re
from pathlib import Path

import pytest
import torch
from center_of_mass import CenterConfig, CenterTask
from double import bound
from runs import losses, same_weights, stopping_at, torchrun
from safetensors.torch import load_file

from internimage.config import ConfigError
from internimage.engine.run import Preempted, train

SETTINGS = dict(
    epochs=3,
    batch_size=8,
    accumulate=2,
    workers=0,
    lr=0.003,
    warmup_epochs=1,
    eval_every=1,
    device="cpu",
    ema_decay=0.5,
)
SCRIPT = Path(__file__).parent / "center_of_mass.py"


def run(output, **more):
    return train(CenterTask(CenterConfig(output=str(output), **SETTINGS | more)), progress=False)


def stop_at(step, output):
    with stopping_at(step), pytest.raises(Preempted, match=f"saved after step {step} of 9"):
        run(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    outcome = run(output)
    assert outcome.complete and outcome.result.shape == (10, 2) and outcome.report == output / "report.html"
    return output


def test_it_learns_and_its_metrics_are_in_the_table(tmp_path):
    run(tmp_path, epochs=12, ema_decay=None, clip_grad=None)
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and set(rows[0]) > {"val_loss", "val_pixels"} and "val_top1" not in rows[0]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 2


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_run_that_was_stopped_resumes_exactly(whole, tmp_path, step):
    stop_at(step, tmp_path)
    assert run(tmp_path).complete
    assert losses(tmp_path) == losses(whole) and same_weights(tmp_path, whole)


def test_other_data_are_refused_in_the_task_s_words(tmp_path):
    stop_at(2, tmp_path)
    with pytest.raises(ConfigError, match="digits was 24, now 32"):
        run(tmp_path, digits=32)
    text = (tmp_path / "finetune.yaml").read_text()
    assert text.splitlines()[1].startswith("digits: 24")  # the task's own settings come first
    (tmp_path / "finetune.yaml").write_text(text.replace("digits: 24", "digits: 32"))
    with pytest.raises(ConfigError, match="was trained on 24 digits, here are 32"):
        run(tmp_path, digits=32)


def test_the_report_has_what_the_task_shows(whole):
    text = (whole / "report.html").read_text()
    assert "<title>Centers</title>" in text and "<h1>Centers of &lt;digits&gt;</h1>" in text
    assert re.findall('<h2 id="(.*?)">', text) == ["curves", "places", "settings"]
    assert re.findall("<figcaption>([^<]*)", text) == [
        "Training loss",
        "Learning rate",
        "Distance",
        "Loss of each epoch",
    ]
    assert text.count("squared distance") == 2 and "cross entropy" not in text and "digits: 24" in text


def test_samples_that_cannot_be_read_are_replaced_and_reported(tmp_path, capsys):
    run(tmp_path, lost=2, epochs=1, warmup_epochs=0)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"'digit {i}' cannot be read (lost); the next image takes its place" for i in range(2)
    ]


def test_a_step_that_is_not_finite_is_skipped_and_kept_as_the_task_says(tmp_path, monkeypatch):
    loss = CenterTask.loss
    calls = iter(range(100))
    monkeypatch.setattr(
        CenterTask, "loss", lambda self, *given: loss(self, *given) * (torch.nan if next(calls) == 3 else 1)
    )
    run(tmp_path, epochs=1, warmup_epochs=0)
    (file,) = (tmp_path / "bad-batches").iterdir()
    kept = torch.load(file, weights_only=True)
    assert kept["digits"].shape == (8, 1, 32, 32) and len(kept["indices"]) == 8
    assert all(value.isfinite().all() for value in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.skipif(os.name == "nt", reason="needs torchrun's processes to be forked")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(tmp_path, parallel):
    settings = SETTINGS | {"accumulate": 1, "parallel": parallel}
    words = [f"{key}={value}" for key, value in settings.items()]
    script = tmp_path / "double.py"
    script.write_text(
        f"import sys, runpy, torch\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nfrom double import in_double\n"
        f"with in_double():\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    for processes in (1, 2):
        torchrun(processes, script, f"output={tmp_path / str(processes)}", *words)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 9 and max(abs(a - b) for a, b in zip(one, two, strict=True)) <= bound(9, settings["lr"])
