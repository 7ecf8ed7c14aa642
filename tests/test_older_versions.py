# SPDX-License-Identifier: MIT
"""Runs and model folders that commit 9e55b57 has written still work (tests/written_by_9e55b57/README.md).

They were computed by other kernels, and perhaps on another processor and with another torch, so numbers are compared
with a tolerance. Measured on the machine that wrote them: losses of resumed runs deviate by at most 1e-5, and by 2e-2
or more if the optimizer's state, the order of the images or a random stream is lost. Outputs of the trained model
deviate by 7e-4, and by 3e-2 or more. They deviate more than the losses: Adam moves the parameters before batch norm,
whose gradient is nothing but rounding errors, by full steps, and only the running mean notices.
"""

import json
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import written_by_9e55b57 as inputs
from conftest import assert_close
from runs import epochs, listing, steps, torchrun
from safetensors.torch import load_file

from internimage.cli import main
from internimage.convert.convert import check_folder
from internimage.weights.readers import open_weights

HERE = Path(inputs.__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
LOSS, RESULT = 1e-3, 1e-2  # relative tolerances of training losses, and of what the trained model outputs
FORWARD = 1e-4  # of outputs in float32


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch):
    """The folders as they were written, and the images at another place than at that time."""
    with zipfile.ZipFile(HERE / "folders.zip") as archive:
        archive.extractall(tmp_path)
    assert inputs.write_images(tmp_path / "moved" / "images") == EXPECTED["images_sha256"]
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(output, **more):
    return inputs.settings("moved/images", str(output), **more)


def move(run: str) -> Path:
    return Path(run).rename(Path("moved", run))


def logits(folder) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).double().eval()
    with torch.no_grad():
        return model(torch.from_numpy(inputs.input_images()))


def expected_logits(folder: str) -> torch.Tensor:
    return torch.tensor(EXPECTED["logits"][folder], dtype=torch.float64)


def check_resumed(run: Path, whole: str, old_steps: list[dict], old_epochs: list[dict], done: int) -> None:
    """What was there is kept, and what follows is as in the run that was not stopped."""
    rows, expected = steps(run), steps(whole)
    assert len(rows) == len(expected) == inputs.STEPS and rows[:done] == old_steps[:done]
    for row, other in zip(rows[done:], expected[done:]):
        assert [row[key] for key in ("step", "epoch", "lr")] == [other[key] for key in ("step", "epoch", "lr")]
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=LOSS)
    rows, expected = epochs(run), epochs(whole)
    assert len(rows) == len(expected) == inputs.STEPS // inputs.STEPS_PER_EPOCH
    assert rows[: len(old_epochs)] == old_epochs
    for row, other in zip(rows, expected):
        assert row.keys() == other.keys() and row["lr"] == other["lr"] and row["val_top1"] == other["val_top1"]
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=LOSS)
        assert float(row["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=RESULT)
    assert_close(logits(run), expected_logits(whole), RESULT)


# ---- unfinished runs


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_resumes(capsys, caplog, damaged):
    run = move("stopped")
    before, recorded = (steps(run), epochs(run)), (run / "finetune.yaml").read_text()
    if damaged:
        newest = run / "checkpoints" / f"step-{inputs.STOPPED:09d}.pt"
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    assert main(["finetune", *settings(run)]) == 0
    done = 6 if damaged else inputs.STOPPED
    assert f"step {done} of {inputs.STEPS}" in capsys.readouterr().err
    assert ("cannot be read" in caplog.text) == damaged
    check_resumed(run, "whole", *before, done)
    assert (run / "finetune.yaml").read_text() == recorded
    assert "report.html" not in listing(run)


def test_a_sharded_run_resumes(written):
    run = move("stopped-sharded")
    before = steps(run), epochs(run)
    result = torchrun(2, HERE / "in_folder.py", written, "finetune", *settings(run, parallel="fsdp"))
    assert f"step {inputs.STOPPED} of {inputs.STEPS}" in result.stderr
    check_resumed(run, "whole-sharded", *before, inputs.STOPPED)


def test_a_run_does_not_resume_with_other_classes_or_settings(capsys):
    before = listing(Path("stopped"))
    assert main(["finetune", *settings("stopped", lr=0.02)]) == 2
    assert "lr was 0.03, now 0.02" in capsys.readouterr().err
    Path("moved/images/train/gray").rename("moved/images/train/middle")
    Path("moved/images/val/gray").rename("moved/images/val/middle")
    assert main(["finetune", *settings("stopped")]) == 2
    assert "(dark, gray, light)" in capsys.readouterr().err
    assert [name for name in listing(Path("stopped")) if not name.startswith(".")] == before


def test_an_unfinished_run_begins_anew():
    assert main(["finetune", *settings("stopped", resume="false", epochs=1, warmup_epochs=0)]) == 0
    assert len(steps("stopped")) == inputs.STEPS_PER_EPOCH and len(epochs("stopped")) == 1
    assert [path.name for path in Path("stopped/checkpoints").iterdir()] == ["step-000000003.pt"]


# ---- finished runs


def test_a_finished_model_loads():
    assert_close(logits("whole"), expected_logits("whole"), 1e-9)


def test_a_finished_model_is_evaluated():
    report = Path("report.json")
    arguments = ["--model", "whole", "--data", "moved/images", "--workers", "0", "--per-class", "--json", report]
    assert main(["evaluate", *map(str, arguments)]) == 0
    result, expected = json.loads(report.read_text()), EXPECTED["evaluation"]
    assert result.keys() == expected.keys()
    assert result["loss"] == pytest.approx(expected["loss"], rel=FORWARD)
    free = {"loss", "data", "internimage", "images_per_second", "model_images_per_second", "peak_memory"}
    assert {k: v for k, v in result.items() if k not in free} == {k: v for k, v in expected.items() if k not in free}


def test_a_finished_model_predicts(capsys):
    folders = [f"moved/{folder}" for folder in inputs.VALIDATION]
    assert main(["predict", "--model", "whole", *folders, "--json", "--topk", "3"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(results) == len(EXPECTED["predictions"]) == 12
    for result, expected in zip(results, EXPECTED["predictions"]):
        assert Path(result["image"]) == Path("moved", expected["image"])
        for found, answer in zip(result["classes"], expected["classes"], strict=True):
            assert found.pop("probability") == pytest.approx(answer.pop("probability"), abs=FORWARD)
            assert found == answer


def test_a_finished_run_is_overwritten(capsys):
    """Its settings are a recipe, and say that `finetune` has written the folder."""
    run = Path("whole")
    (run / "notes.txt").write_text("mine")
    recipe = Path("recipe.yaml")
    recipe.write_bytes((run / "finetune.yaml").read_bytes())
    arguments = ["finetune", str(recipe), "data=moved/images", "epochs=1", "warmup_epochs=0"]
    before = load_file(run / "model.safetensors")
    assert main(arguments) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert main([*arguments, "overwrite=true"]) == 0
    assert len(steps(run)) == inputs.STEPS_PER_EPOCH and len(epochs(run)) == 1
    after = load_file(run / "model.safetensors")
    assert after.keys() == before.keys() and not torch.equal(after["head.weight"], before["head.weight"])
    assert (run / "notes.txt").read_text() == "mine"


# ---- converted weights


def test_a_converted_model_loads_and_is_ready_for_the_hub(capsys):
    assert_close(logits("converted"), expected_logits("converted"), 1e-9)
    files = check_folder("converted")
    assert sorted(files) == listing(Path("converted")) and len(files) == 6
    assert main(["push", "converted", "OWNER/NAME", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}\n" in printed for name in files) and "not uploaded" not in printed


def test_a_converted_model_is_converted_again():
    assert main(["convert", "converted", "again", "--verify"]) == 0
    old, new = open_weights("converted"), open_weights("again")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key].read(), new[key].read()) for key in old)


def test_a_converted_model_is_not_replaced(capsys):
    """At that time nothing in the folder said that `convert` had written it."""
    before = {path: path.read_bytes() for path in Path("converted").iterdir()}
    assert main(["convert", "whole", "converted", "--overwrite"]) == 2
    assert "overwrite replaces nothing there" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("converted").iterdir()} == before
