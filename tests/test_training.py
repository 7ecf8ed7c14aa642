# SPDX-License-Identifier: MIT
"""Training that can be relied on: the same batches and weights whatever happens in between, and what happens then."""

import csv
import errno
import os
import random
import re
import signal
import subprocess
import sys

import launched
import numpy as np
import pytest
import timm
import torch
from double import bound, in_double
from runs import ROOT, arguments, environment, losses, same_weights, steps, stop_at, wait_for_checkpoint, write_noise
from safetensors.torch import load_file
from timm.data import Mixup
from timm.layers import DropPath
from torch import nn

from internimage.cli import main
from internimage.config import ConfigError, load_config
from internimage.engine import checkpoint, trainer
from internimage.engine.optimizer import create_optimizer, learning_rate
from internimage.engine.rng import BatchPlan, DropPathDraws, PlanSampler
from internimage.engine.run_folder import check_output, prepare_output
from internimage.errors import UserError
from internimage.tasks.classification.augment import training_transform
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.finetune import finetune
from internimage.tasks.classification.task import ClassificationTask

PREPROCESSING = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), train=(9, 9, 9), val=(4, 4, 4))


def settings(data, output, **more):
    base = dict(
        data=str(data), output=str(output), model="internimage_atto", pretrained=False, img_size=32, epochs=3,
        batch_size=8, workers=0, lr=0.003, warmup_epochs=0 if more.get("epochs") == 1 else 1, drop_path=0.2, mixup=0.4,
        cutmix=0.5, eval_every=0,
        auto_augment="rand-m5-mstd0.5", random_erasing=0.3, device="cpu", report=False,
    )  # fmt: skip
    return FinetuneConfig(**(base | more))


# ---- draws


def batches(data, config, start=0, stop=6):
    task = ClassificationTask(config)
    task.open_data()
    task.data_config, task.transform = PREPROCESSING, training_transform(config, PREPROCESSING)
    plan = BatchPlan(task.train_size, config.batch_size, config.accumulate, config.seed)
    sampler = PlanSampler(plan, list(range(config.accumulate)), start, stop)
    return list(task.train_loader(sampler, False))


def test_any_number_of_workers_gives_the_same_batches(data, tmp_path):
    expected = batches(data, settings(data, tmp_path))
    assert len(expected) == 6
    for workers in (1, 2, 3):
        torch.manual_seed(workers), random.seed(workers), np.random.seed(workers)
        found = batches(data, settings(data, tmp_path, workers=workers))
        for a, b in zip(expected, found, strict=True):
            assert a.samples == b.samples and all(map(torch.equal, a.data, b.data))
    assert not torch.equal(expected[0].data[0], batches(data, settings(data, tmp_path, seed=1))[0].data[0])


def test_batches_from_any_step_are_those_of_a_whole_run(data, tmp_path):
    expected = batches(data, settings(data, tmp_path))
    for start in (1, 3, 5):  # an epoch has three steps
        found = batches(data, settings(data, tmp_path), start)
        assert all(torch.equal(a.data[0], b.data[0]) for a, b in zip(expected[start:], found, strict=True))


def test_an_epoch_holds_every_image_once_and_an_image_is_drawn_anew_in_the_next(data, tmp_path):
    found = batches(data, settings(data, tmp_path, batch_size=27, mixup=0.0, cutmix=0.0), stop=2)
    images = {}
    for batch in found:
        assert sorted(index for _, index in batch.samples) == list(range(27))
        for (epoch, index), image in zip(batch.samples, batch.data[0]):
            images[epoch, index] = image
    assert sum(torch.equal(images[0, i], images[1, i]) for i in range(27)) == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_mixing_the_micro_batches_is_mixing_the_batch(count):
    """Against timm's Mixup on the whole batch."""
    size = 16
    images, targets = torch.rand(size, 3, 8, 8), torch.arange(size) % 5
    plan = BatchPlan(100, size, count, 0)
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    assert sorted(i for part in range(count) for i in plan.positions(part)) == list(range(size))
    for seed in range(4):
        np.random.seed(seed)
        expected, expected_targets = mix(images.clone(), targets.clone())
        for part in range(count):
            places = plan.positions(part)
            np.random.seed(seed)
            found, found_targets = mix(images[places].clone(), targets[places].clone())
            assert torch.equal(found, expected[places]) and torch.equal(found_targets, expected_targets[places])


def test_drop_path_draws_do_not_depend_on_the_micro_batches_and_have_the_rate():
    model = nn.Sequential(nn.Linear(4, 4), DropPath(0.25), nn.Sequential(DropPath(0.6)), DropPath(0.0))
    whole = DropPathDraws(model, BatchPlan(1000, 16, 1, 0), seed=3)
    assert [layer.drop_prob for layer in whole.layers] == [0.25, 0.6]
    half_plan = BatchPlan(1000, 16, 2, 0)
    half = DropPathDraws(nn.Sequential(nn.Linear(4, 4), DropPath(0.25), DropPath(0.6)), half_plan, seed=3)
    kept = torch.zeros(2)
    for step in range(200):
        whole.draw(step, 0)
        for part in range(2):
            half.draw(step, part)
            for a, b in zip(whole.layers, half.layers):
                assert torch.equal(a.factor[half_plan.positions(part)], b.factor)
        kept += torch.stack([(layer.factor > 0).float().mean() for layer in whole.layers])
    torch.testing.assert_close(kept / 200, torch.tensor([0.75, 0.4]), atol=0.03, rtol=0)
    assert all(value == 0 or value == pytest.approx(1 / 0.75) for value in whole.layers[0].factor.tolist())
    x = torch.ones(16, 3, 2)
    model[1].train()
    assert torch.equal(model[1](x)[:, 0, 0], whole.layers[0].factor)
    model[1].eval()
    assert model[1](x) is x


def test_unreadable_training_image_is_replaced_by_the_next_and_named(data, tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    for label in "012":
        (folder / "train" / label).mkdir()
        for file in (data / "train" / label).iterdir():
            (folder / "train" / label / file.name).write_bytes(file.read_bytes())
    (folder / "train" / "1" / "3.png").write_bytes(b"nothing")
    finetune(settings(folder, tmp_path / "run", epochs=1, batch_size=27, mixup=0.0, cutmix=0.0), progress=False)
    out, err = capsys.readouterr()
    assert err.count("3.png' cannot be read (not an image); the next image takes its place") == 1 and out == ""


# ---- what a run says, and what it leaves


def command(data, output, **more):
    return main(["finetune", *(f"{k}={v}" for k, v in vars(settings(data, output, **more)).items() if v is not None)])


def test_a_run_ends_with_its_accuracy_and_a_report_however_often_it_evaluates(data, tmp_path, capsys):
    """And the evaluations leave no trace in the weights."""
    said, last = {}, {}
    for every in (0, 1, 2):
        output = tmp_path / str(every)
        assert command(data, output, eval_every=every, report=True, ema_decay=0.9) == 0
        said[every], err = capsys.readouterr()
        rows = list(csv.DictReader((output / "log.csv").open(newline="")))
        last[every] = rows[-1]
        evaluated = [epoch for epoch, row in enumerate(rows, 1) if row["val_top1"]]
        assert evaluated == {0: [3], 1: [1, 2, 3], 2: [2, 3]}[every]
        lines = [line for line in err.splitlines() if line.startswith("epoch ")]
        assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
        assert ["val top-1" in line for line in lines] == [epoch in evaluated for epoch in (1, 2, 3)]
    top1, loss = float(last[0]["val_top1"]), float(last[0]["val_loss"])
    for every, out in said.items():
        assert out.splitlines() == [
            f"top-1 {top1:.2f} % on 12 validation images, loss {loss:.4f}",
            f"model: {tmp_path / str(every)}",
            f"report: {tmp_path / str(every) / 'report.html'}",
        ]
        assert f"{top1:.2f} %" in (tmp_path / str(every) / "report.html").read_text(encoding="utf-8")
        assert same_weights(tmp_path / "0", tmp_path / str(every))
        assert [row["loss"] for row in steps(tmp_path / "0")] == [row["loss"] for row in steps(tmp_path / str(every))]


def test_the_help_says_what_eval_every_0_does(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    assert "0: only after the last epoch" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_validation_images_says_so(data, tmp_path, capsys):
    assert command(data / "train", tmp_path / "run", epochs=1, report=True) == 0
    out = capsys.readouterr().out
    assert (
        "there are no validation images (DATA/val/CLASS/IMAGE), so the accuracy is unknown" in out
        and f"model: {tmp_path / 'run'}" in out
    )
    assert "report" not in out and not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("odd"), KeyError()])
def test_a_report_that_fails_costs_a_message_and_not_the_model(data, tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("internimage.engine.run.write_report", fail)
    assert command(data, tmp_path / "run", epochs=1, report=True) == 1  # done, with something left out
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "could not be written" in line]
    assert "report.html' could not be written" in line and "the model is saved without it" in line
    assert "Traceback" not in err and "top-1 " in out and "report:" not in out
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_validation_images_that_cannot_be_read_cost_the_accuracy_and_not_the_model(data, tmp_path, capsys):
    folder = write_noise(tmp_path / "data", train=(9, 9, 9), val=(2, 2, 2))
    for file in (folder / "val").rglob("*.png"):
        file.write_bytes(b"nothing")
    assert command(folder, tmp_path / "run", epochs=1, report=True) == 1
    out, err = capsys.readouterr()
    assert "the validation images were not evaluated: none of 6 images could be read" in err and "Traceback" not in err
    assert out == f"model: {tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_some_validation_images_that_cannot_be_read_are_told(data, tmp_path, capsys):
    folder = write_noise(tmp_path / "data", train=(9, 9, 9), val=(2, 2, 2))
    (folder / "val" / "1" / "0.png").write_bytes(b"nothing")
    assert command(folder, tmp_path / "run", epochs=1) == 0
    out, err = capsys.readouterr()
    assert " on 5 validation images" in out and "validation images that could not be read and are not counted: 1" in err


def test_names_of_any_bytes_go_through_everything(tmp_path, capsys):
    """A folder from a machine with another encoding: classes and images whose names are not UTF-8."""
    folder = write_noise(tmp_path / "data", train=(9, 9), val=(3, 3))
    try:
        for split in ("train", "val"):
            os.rename(folder / split / "1", os.fsencode(folder / split) + b"/caf\xe9")
        os.rename(folder / "val" / "0" / "1.png", os.fsencode(folder / "val" / "0") + b"/\xff.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    run = tmp_path / "run"
    assert command(folder, run, epochs=1, warmup_epochs=0, report=True) == 0
    assert "caf\\udce9" in (run / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run), "--data", str(folder), "--workers", "0", "--per-class"]) == 0
    assert "caf\\udce9" in capsys.readouterr().out
    picture = tmp_path / "points.png"
    assert main(["predict", str(folder / "val"), "--model", str(run), "--draw-points", str(picture)]) == 0
    assert "\\udcff.png" in capsys.readouterr().out and picture.is_file()


# ---- resume


def test_killed_runs_end_bitwise_like_one_that_was_never_killed():
    """10 kills with SIGKILL: at random times, half way in a checkpoint, before and after its rename, in a removal; with
    and without workers."""
    result = launched.python("scripts/checks/kill_resume.py", "--kills", "10", variables=environment(), timeout=1000)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"10 kills, 2 runs: all the same", result.stdout)
    for place in ("write", "before-rename", "after-rename", "removal"):
        assert place in result.stdout


@pytest.mark.slow
def test_killed_runs_with_damaged_checkpoints_name_them_and_end_bitwise():
    """Of one process, and of two whose parent alone is killed as well, so that they have to end by themselves."""
    result = subprocess.run(
        [sys.executable, "scripts/checks/kill_resume.py", "--kills", "24", "--kinds", "file,ddp,fsdp", "--damage",
         "flip,zero,truncate,delete"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"24 kills, \d+ checkpoints damaged, \d+ runs: all the same", result.stdout)
    for what in ("(file)", "(ddp)", "(fsdp)", "(parent)", "flip step-", "zero step-", "truncate step-", "delete step-"):
        assert what in result.stdout


def test_workers_and_accumulation_leave_the_weights_what_they_are(data, tmp_path):
    finetune(settings(data, tmp_path / "a", workers=0), progress=False)
    finetune(settings(data, tmp_path / "b", workers=2), progress=False)
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_run_in_mixed_precision_resumes_with_its_scaler(data, tmp_path, precision):
    finetune(settings(data, tmp_path / "whole", precision=precision, checkpoint_every=1), progress=False)
    config = settings(data, tmp_path / "parts", precision=precision, checkpoint_every=1)
    stop_at(config, 4)
    finetune(config, progress=False)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_checkpoint_holds_everything_and_two_are_kept(data, tmp_path):
    finetune(settings(data, tmp_path, ema_decay=0.9), progress=False)
    kept = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step-000000009.pt", "step-000000006.pt"]
    state = checkpoint.read_file(kept[0])[0]
    assert set(state) == {"model", "average", "optimizer", "scaler", "schedule", "progress", "data", "random"}
    assert state["progress"]["step"] == 9 and len(state["progress"]["epochs"]) == 2  # it is written before validating
    images = state["data"].pop("images")
    assert state["data"] == {"samples": 27, "classes": ["0", "1", "2"]} and len(set(images)) == 3
    assert set(state["random"]) == {"python", "numpy", "torch"}
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[key], state["average"][key]) for key in saved)
    assert not torch.equal(saved["head.weight"], state["model"]["head.weight"])


def test_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path, caplog):
    finetune(settings(data, tmp_path / "whole"), progress=False)
    config = settings(data, tmp_path / "run")
    stop_at(config, 7)
    newest = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    finetune(config, progress=False)
    assert "cannot be read and is skipped" in caplog.text
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_of_a_sharded_run_is_not_trained_over_by_one_process(data, tmp_path):
    """Two sharding processes were stopped, and the same command came back as one process."""
    config = settings(data, tmp_path / "run", parallel="fsdp")
    prepare_output(config)
    sharded = tmp_path / "run" / "checkpoints" / "step-000000003"
    sharded.mkdir(parents=True)
    with pytest.raises(ConfigError, match="was written by several sharding processes and cannot be read as one"):
        finetune(config, progress=False)
    assert checkpoint.checkpoints(sharded.parent) == [sharded]


def test_sigterm_saves_exits_with_0_and_the_same_command_goes_on(data, tmp_path, capsys):
    """The whole way: a process, a real signal, the same command again."""
    arguments = [f"{k}={v}" for k, v in vars(settings(data, tmp_path / "run", epochs=25)).items() if v is not None]
    command = ["-m", "internimage", "finetune", *arguments]
    process = launched.Python(command, environment())
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    stopped = process.communicate()
    assert stopped.returncode == 0, stopped.stderr
    step = int(re.search(r"asked to stop: saved after step (\d+) of 75", stopped.stdout).group(1))
    assert step < 75 and "the same command resumes from there" in stopped.stdout
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[0].name == f"step-{step:09d}.pt"
    assert not (tmp_path / "run" / "model.safetensors").exists()

    again = launched.python(*command, variables=environment())
    assert again.returncode == 0 and f"step {step} of 75" in again.stderr
    assert [int(row["step"]) for row in steps(tmp_path / "run")] == list(range(1, 76))
    assert main(["finetune", *arguments]) == 2 and "holds an earlier result" in capsys.readouterr().err


def test_an_unfinished_run_of_other_settings_is_not_continued(data, tmp_path):
    stop_at(settings(data, tmp_path), 4)
    with pytest.raises(ConfigError, match=r"lr was 0\.003, now 0\.1.*resume=false"):
        finetune(settings(data, tmp_path, lr=0.1), progress=False)
    assert check_output(settings(data, tmp_path, workers=3))
    finetune(settings(data, tmp_path, lr=0.1, resume=False, epochs=1), progress=False)
    assert len(steps(tmp_path)) == 3


# ---- what goes wrong


def poison(monkeypatch, bad, value=float("nan")):
    """Make the images of some steps bad."""
    place = trainer.Trainer._to_device

    def patched(self, batch, step):
        images, targets = place(self, batch, step)
        return (images * value if step in bad else images), targets

    monkeypatch.setattr(trainer.Trainer, "_to_device", patched)


def test_a_step_with_a_loss_of_nan_is_left_out_and_its_batch_kept(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2})
    finetune(settings(data, tmp_path, checkpoint_every=1, ema_decay=0.5), progress=False)
    out, err = capsys.readouterr()
    assert "the loss is nan in epoch 1, step 3: the step is skipped (1 of nan_limit=10)" in err and out == ""
    rows = steps(tmp_path)
    assert [row["loss"] for row in rows].count("nan") == 1 and rows[2]["loss"] == "nan"
    with (tmp_path / "log.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    assert epochs[0]["skipped_steps"] == "1" and float(epochs[0]["train_loss"]) > 0
    for key, value in load_file(tmp_path / "model.safetensors").items():
        assert value.isfinite().all(), key  # batch norm's statistics too
    (file,) = (tmp_path / "bad-batches").iterdir()
    bad = torch.load(file, weights_only=True)
    assert bad["images"].isnan().any() and len(bad["indices"]) == 8 and set(bad["epochs"]) == {0}
    expected = batches(data, settings(data, tmp_path))[2]
    assert bad["indices"] == [index for _, index in expected.samples]


def test_a_step_that_is_left_out_leaves_no_trace_in_the_weights(data, tmp_path, monkeypatch):
    """The weights and statistics after a bad first step are those from before it."""
    seen = []
    leave_out = trainer.Trainer._skip_step

    def watched(self, *arguments):
        leave_out(self, *arguments)
        seen.append({key: value.clone() for key, value in self.model.state_dict().items()})

    monkeypatch.setattr(trainer.Trainer, "_skip_step", watched)
    poison(monkeypatch, {0, 1})
    finetune(settings(data, tmp_path, epochs=1), progress=False)
    torch.manual_seed(0)
    first, second = seen
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["conv_head.1.0.num_batches_tracked"] == 0 and (first["conv_head.1.0.running_mean"] == 0).all()


def test_training_stops_after_the_limit_of_bad_steps(data, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 4, 5}, float("inf"))
    with pytest.raises(trainer.TrainingError, match=r"epoch 2, step 5, and 2 steps were skipped.*bad-batches"):
        finetune(settings(data, tmp_path, nan_limit=2), progress=False)
    assert len(list((tmp_path / "bad-batches").iterdir())) == 2
    assert not (tmp_path / "model.safetensors").exists()


def test_the_count_of_bad_steps_survives_a_resume(data, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 5})
    config = settings(data, tmp_path, nan_limit=2)
    stop_at(config, 4)
    with pytest.raises(trainer.TrainingError, match="2 steps were skipped"):
        finetune(config, progress=False)


def test_a_full_disk_stops_with_a_message_and_keeps_the_last_checkpoint(data, tmp_path):
    """A real limit of the system on the size of files, in a process of its own."""
    run = tmp_path / "run"
    config = settings(data, run, checkpoint_every=2)
    stop_at(config, 4)
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    arguments = [f"{k}={v}" for k, v in vars(config).items() if v is not None]
    code = (
        "import resource, sys; from internimage.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); sys.exit(main(sys.argv[1:]))"
    )
    result = launched.python("-c", code, "finetune", *arguments, variables=environment())
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "the checkpoint of step 6 could not be written" in result.stderr
    assert "the last good one is" in result.stderr and "step-000000004.pt" in result.stderr
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    finetune(config, progress=False)
    finetune(settings(data, tmp_path / "whole"), progress=False)
    assert same_weights(run, tmp_path / "whole")


def test_no_space_left_is_named(tmp_path, monkeypatch):
    checkpoint.save_file(tmp_path, 1, {"x": torch.zeros(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match=r"step 2 could not be written \(.*No space left on device.*step-000000001"):
        checkpoint.save_file(tmp_path, 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


# ---- options


def test_frozen_weights_stay_bitwise_and_the_others_do_not(data, tmp_path):
    seed = settings(data, tmp_path)
    torch.manual_seed(seed.seed)
    for freeze, trained in ((2, ("levels.2.", "levels.3.", "conv_head.", "head.")), (5, ("head.",))):
        output = tmp_path / f"freeze{freeze}"
        start = {}
        init = trainer.Trainer.__init__

        def watched(self, task, world, model, *arguments, start=start, init=init):
            start |= {key: value.clone() for key, value in model.state_dict().items()}
            init(self, task, world, model, *arguments)

        trainer.Trainer.__init__ = watched
        try:
            finetune(settings(data, output, freeze=freeze, ema_decay=0.9), progress=False)
        finally:
            trainer.Trainer.__init__ = init
        end = load_file(output / "model.safetensors")
        for key, value in end.items():
            if not key.startswith(trained):
                assert torch.equal(value, start[key]), key
        assert not torch.equal(end["head.weight"], start["head.weight"])
        if freeze == 2:
            assert not torch.equal(end["levels.2.blocks.0.mlp.fc1.weight"], start["levels.2.blocks.0.mlp.fc1.weight"])


def test_accumulated_parts_give_the_losses_of_the_whole_batch(data, tmp_path):
    """With batch norm fixed: over a part it is another function than over the batch."""
    found = []
    for parts in (1, 2, 4):
        config = settings(data, tmp_path / str(parts), accumulate=parts, freeze=5)
        with in_double():
            finetune(config, progress=False)
        found.append(losses(tmp_path / str(parts)))
    assert len(found[0]) == 9
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=0, atol=bound(9, config.lr))


def test_grad_checkpointing_and_channels_last_leave_the_losses_what_they_are(data, tmp_path):
    found = []
    for name, more in (("plain", {}), ("less", dict(grad_checkpointing=True)), ("last", dict(channels_last=True))):
        config = settings(data, tmp_path / name, **more)
        with in_double():
            finetune(config, progress=False)
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 9
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=0, atol=bound(9, config.lr))


@pytest.mark.slow
def test_compiled_training_gives_the_losses_of_uncompiled(data, tmp_path):
    """Also where images of another size were compiled before in this process."""
    other = timm.create_model("internimage_atto", num_classes=2)
    torch.compile(other)(torch.randn(2, 3, 96, 64)).sum().backward()
    found = []
    for name, more in (("plain", {}), ("compiled", dict(compile=True))):
        config = settings(data, tmp_path / name, **more)
        with in_double():
            finetune(config, progress=False)
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=bound(9, config.lr))


def layer_of(name, model):
    """The official grouping: a block is a layer; what stands before it goes with it, the head with the last one."""
    starts = np.cumsum([0] + [len(stage.blocks) for stage in model.levels])
    if name.startswith("patch_embed."):
        return 0
    match = re.match(r"levels\.(\d)\.(blocks|post_norms|norm|downsample)\.(?:(\d+)\.)?", name)
    if not match:
        return starts[4] - 1
    stage = int(match[1])
    if match[2] == "blocks":
        return starts[stage] + int(match[3])
    if match[2] == "post_norms":
        return starts[stage] + model.levels[stage].post_norm_blocks[int(match[3])]
    return min(starts[stage + 1], starts[4] - 1)


@pytest.mark.parametrize("size", ["atto", "tiny", "small", "base", "large", "xlarge", "huge", "giant"])
def test_layer_decay_groups_are_timms(size):
    """Against timm's own grouping, worked out from the model's matcher, for the learning rate of every parameter."""
    model = timm.create_model(f"internimage_{size}", device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    ours = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.8)
    layers = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    deepest = max(layers.values())
    assert layers == {name: layer_of(name, model) for name in names.values()}
    found = set()
    for group in ours.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == pytest.approx(0.8 ** (deepest - layers[name])), name
            assert group["weight_decay"] == (0.0 if parameter.ndim <= 1 or name.endswith(".bias") else 0.05), name
            found.add(name)
    assert found == set(names.values())
    assert deepest == sum(len(stage.blocks) for stage in model.levels) - 1


@pytest.mark.parametrize("size", ["atto", "huge"])
def test_offset_lr_factor_by_hand(data, tmp_path, size):
    """With layer decay: 0.8 a layer from the head on, and a tenth of that for what moves the sampled points."""
    model = timm.create_model(f"internimage_{size}", device="meta")
    config = settings(data, tmp_path, layer_decay=0.8, offset_lr_factor=0.1, lr=0.01, warmup_epochs=0, sched="none")
    optimizer, scheduler = create_optimizer(model, config, steps_per_epoch=3)
    assert scheduler is None
    names = {id(p): name for name, p in model.named_parameters()}
    last = sum(len(stage.blocks) for stage in model.levels) - 1
    found, slow = {}, set()
    for group in optimizer.param_groups:
        assert group["params"] and len(group["params"]) == len(group.get("param_names", group["params"]))
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group["lr"]
            expected = 0.01 * 0.8 ** (last - layer_of(name, model))
            if ".dcn.offset." in name or ".dcn.center_feature_scale_proj_" in name:
                expected *= 0.1
                slow.add(name)
            assert group["lr"] == pytest.approx(expected), name
            assert group["weight_decay"] == (0.0 if parameter.ndim <= 1 or name.endswith(".bias") else 0.05), name
    assert found.keys() == set(names.values())
    assert len(slow) == (last + 1) * (4 if size == "huge" else 2)
    assert found["levels.0.blocks.0.dcn.mask.weight"] == pytest.approx(0.01 * 0.8**last)
    assert found["head.weight"] == pytest.approx(0.01) and learning_rate(optimizer) == pytest.approx(0.01)


def test_offset_lr_factor_in_a_schedule_and_in_a_run(data, tmp_path):
    model = timm.create_model("internimage_atto", device="meta")
    config = settings(data, tmp_path / "a", offset_lr_factor=0.25, lr=0.1, warmup_epochs=0, min_lr=0.0, epochs=2)
    optimizer, scheduler = create_optimizer(model, config, steps_per_epoch=4)
    scheduler.step_update(4)  # half way down the cosine: half the rate
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [0.0125, 0.05]
    finetune(settings(data, tmp_path / "still", offset_lr_factor=0.0, weight_decay=0.0, epochs=2), progress=False)
    weights = load_file(tmp_path / "still" / "model.safetensors")
    offsets = [value for name, value in weights.items() if ".dcn.offset." in name]
    assert offsets and all((value == 0).all() for value in offsets)  # as they were made
    assert any((value != 0).any() for name, value in weights.items() if ".dcn.mask." in name)
    with pytest.raises(ConfigError, match="must be 1: .resnet10t. has no layers that sample at learned offsets"):
        finetune(settings(data, tmp_path / "b", model="resnet10t", offset_lr_factor=0.1), progress=False)


def test_loss_curves_of_the_kernel_and_of_the_reference_agree(data, tmp_path):
    """The kernels of this process, and one that cannot load them."""
    with in_double():
        finetune(settings(data, tmp_path / "kernel", epochs=7), progress=False)
    unload = "import torch, torchvision\ndef fail(path): raise OSError('not here')\ntorch.ops.load_library = fail\n"
    check = "import internimage.extension as e; assert e.backend('dcnv3', 'cpu').name == 'plain torch'\n"
    main_code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom double import in_double, main\n"
        "with in_double(): sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        unload + check + main_code,
        *arguments(settings(data, tmp_path / "plain", epochs=7)),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [losses(tmp_path / name) for name in ("kernel", "plain")]
    assert len(found[0]) == 21
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=bound(21, 0.003))


def test_settings_that_cannot_be(data, tmp_path):
    for more, message in (
        (dict(batch_size=6, accumulate=4), "must divide by 1 processes times accumulate=4"),
        (dict(batch_size=6, accumulate=2), "must be even"),
        (dict(parallel="horovod"), "ddp or fsdp"),
        (dict(parallel="fsdp", precision="float16"), "float32 or bfloat16"),
        (dict(freeze=6), "from 0 to 5"),
        (dict(workers=-1), "'workers' must be a whole number from 0 to 1024, got -1"),
        (dict(lr=float("nan")), "'lr' must be a number of at least 0, got nan"),
        (dict(lr=-0.1), "'lr' must be a number of at least 0, got -0.1"),
        (dict(drop_path=1.0), "at least 0 and below 1"),
        (dict(hflip=1.5), "'hflip' must be a number from 0 to 1"),
        (dict(ema_decay=0.0), "above 0 and at most 1"),
        (dict(img_size=0), "'img_size' must be a whole number from 1"),
        (dict(clip_grad=-1.0), "'clip_grad' must be a number above 0"),
        (dict(ratio_max=0.5), "'ratio_max' must be a number of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(data, tmp_path, **more)
    for more in (
        dict(model="convit_tiny", grad_checkpointing=True),
        dict(opt="adamww"),
        dict(sched="cosin"),
        dict(sched="plateau"),
        dict(auto_augment="random"),
    ):
        with pytest.raises(ConfigError):
            finetune(settings(data, tmp_path / "x", **more), progress=False)
    assert not (tmp_path / "x").exists()


def test_tensorboard_files(data, tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings(data, tmp_path, tensorboard=True, eval_every=1)
    stop_at(config, 5)
    finetune(config, progress=False)
    events = event_file.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "val/top1"} <= set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in steps(tmp_path)]


def test_the_command_line_names_what_is_wrong_with_two_words_alike(data, tmp_path, capsys):
    assert main(["finetune", f"data={data}", f"output={tmp_path / 'x'}", "acumulate=2"]) == 2
    assert "did you mean 'accumulate'" in capsys.readouterr().err


def test_text_stays_as_it_was_typed(data, tmp_path):
    """YAML would make numbers and truth of such names."""
    for text in ("007", "1e3", "on", "2024", "0x1f", "1_000", "photos"):
        config = load_config(FinetuneConfig, None, [f"data={text}", f"output={text}", "checkpoint=null"])
        assert (config.data, config.output, config.checkpoint) == (text, text, None)
    assert load_config(FinetuneConfig, None, ["data='a b'", "output=x"]).data == "a b"
