# SPDX-License-Identifier: MIT
"""What goes wrong around a run: signals, full disks, images and folders that only one of several processes sees."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import launched
import numpy as np
import pytest
import torch
from double import bound, in_double
from runs import (
    ROOT,
    environment,
    epochs,
    losses,
    same_weights,
    settings,
    steps,
    stop_at,
    torchrun,
    torchrun_command,
    wait_for_checkpoint,
    write_noise,
)  # fmt: skip

from internimage.cli import main
from internimage.config import ConfigError
from internimage.data.images import DataError
from internimage.engine import checkpoint, trainer
from internimage.engine.log import TrainingLog
from internimage.errors import CheckpointError
from internimage.files import WriteError
from internimage.tasks.classification.finetune import finetune

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), train=(9, 9, 9), val=(5, 5, 7))


@pytest.fixture(scope="module")
def faults(data, tmp_path_factory):
    """What faults.py saw in two processes, and its folder."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "map.txt").write_text("0\n9\n8\n7\n1\n2\n")
    torchrun(2, TESTS / "faults.py", data, folder)
    return folder, json.loads((folder / "faults.json").read_text())


def told(faults, name, code=2):
    """The message of a scenario in which both processes ended with a status: the first has it, and it is one line."""
    first, second = faults[1][name]
    assert first["code"] == second["code"] == code
    assert "Traceback" not in first["err"] + second["err"] and "error:" not in second["err"], second["err"]
    lines = [line for line in first["err"].splitlines() if "error:" in line]
    assert len(lines) == 1, first["err"]
    return lines[0]


# ---- several processes, one of them in trouble


@pytest.mark.parametrize("kind", ["file", "shards, first", "shards, second"])
def test_a_full_disk_of_one_process_stops_all_and_the_last_checkpoint_stays(faults, kind):
    name = f"full disk, {kind}"
    end = "" if "shards" in kind else ".pt"
    kept = [f"step-000000003{end}", f"step-000000002{end}"]
    message = told(faults, name, [2, kept, 0])  # status, checkpoints, half written ones
    assert "the checkpoint of step 4 could not be written (" in message and (
        "File too large" in message or "full disk" in message
    )
    assert "the last good one is" in message and kept[0] in message
    whole = "sharded" if "shards" in kind else "whole"
    run = faults[0] / name.rpartition(", ")[0] if "shards" in kind else faults[0] / name
    assert losses(run) == losses(faults[0] / whole) and same_weights(run, faults[0] / whole)


def test_a_bad_batch_that_cannot_be_kept_stops_all(faults):
    message = told(faults, "bad batch")
    assert "the batch of step 4" in message and "step-000000004-process-1.pt' (File too large)" in message
    assert not (faults[0] / "bad batch" / "bad-batches" / "step-000000004-process-1.pt").exists()


def test_a_log_that_cannot_be_written_stops_all(faults):
    assert "steps.csv' could not be written (No space left on device)" in told(faults, "full log")
    kept = checkpoint.checkpoints(faults[0] / "full log" / "checkpoints")
    assert [path.name for path in kept] == ["step-000000004.pt", "step-000000003.pt"]


def test_images_that_one_process_cannot_read_stop_all(faults):
    """Read by a loader's worker, whose traceback is not the user's."""
    assert re.search(r"20 images in a row cannot be read; the first is '.*png' \(not an image\)",
                     told(faults, "unreadable"))  # fmt: skip


def test_a_result_that_cannot_be_written_is_written_by_the_same_command(faults):
    message = told(faults, "unwritable result", [2, False, 0, True])
    assert "training is done, and the result could not be written" in message


def test_a_damaged_sharded_checkpoint_is_passed_over_and_its_step_saved_again(faults):
    """With layer decay and a factor for offsets, two parts a step, in bfloat16; weights that are not averaged are
    validated between epochs. The end is bitwise that of a run that was not stopped."""
    first, second = faults[1]["damaged shards"]
    assert first["code"] == second["code"] == [0, "step-000000004", [4]]
    passed, going = [line for line in first["err"].splitlines() if "step-00000000" in line and "resuming" not in line]
    assert "step-000000004' cannot be read and is skipped: its '__1_0.distcp' has 1000 bytes" in passed
    assert "the run resumes from '" in going and "step-000000003'" in going and "is skipped" not in second["err"]
    run, again = faults[0] / "layered", faults[0] / "damaged shards"
    newest = again / "checkpoints" / "step-000000006"
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"} == {file.name for file in newest.iterdir()}
    assert losses(run) == losses(again) and epochs(run) == epochs(again) and same_weights(run, again)


def test_a_label_outside_the_classes_ends_evaluation_in_all(faults):
    assert "the class map has 6 classes and the model 3; the model does not know 7, 8, 9" in told(
        faults, "label outside"
    )


def test_an_output_folder_that_one_machine_does_not_see_is_refused(faults):
    assert "the processes find different checkpoints" in told(faults, "other folder")


def test_a_step_left_out_in_one_process_leaves_the_scaler_of_all(faults):
    """The loss of the second process is not finite in two steps; gradients never overflow."""
    assert [process["code"] for process in faults[1]["left out"]] == [[0, 65536.0]] * 2
    rows = steps(faults[0] / "left out")
    assert [row["step"] for row in rows if row["loss"] == "nan"] == ["2", "5"]
    assert epochs(faults[0] / "left out")[-1]["skipped_steps"] == "2"


def test_accumulated_parts_of_two_processes_give_the_losses_of_the_whole_batch(faults, data, tmp_path):
    config = settings(data, tmp_path, epochs=2, mixup=0.4, freeze=5)
    with in_double():
        finetune(config, progress=False)
    one = losses(tmp_path)
    for name in ("accumulated", "accumulated, sharded"):
        assert [process["code"] for process in faults[1][name]] == [0, 0]
        np.testing.assert_allclose(losses(faults[0] / name), one, rtol=0, atol=bound(len(one), config.lr))


def test_failures_of_several_processes_stand_in_the_order_of_the_images(faults, data, tmp_path):
    """Five damaged images of 17 over three processes, one whole batch among them; the same report as of one process."""
    folder = write_noise(tmp_path / "val", **{"images": (5, 5, 7)}) / "images"
    for file in ("0/1", "0/4", "1/2", "2/0", "2/6"):
        (folder / f"{file}.png").write_bytes(b"nothing")
    arguments = ["evaluate", "--model", str(faults[0] / "whole"), "--data", str(folder), "--batch-size", "1"]
    assert main([*arguments, "--workers", "0", "--json", str(tmp_path / "one.json")]) == 0
    torchrun(3, "-m", "internimage", *arguments, "--workers", "1", "--json", tmp_path / "many.json")
    one, many = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "many.json"))
    assert [Path(entry["file"]).name for entry in one["skipped_files"]] == ["1.png", "4.png", "2.png", "0.png", "6.png"]
    for key in ("images", "skipped", "top1", "top5", "skipped_files"):
        assert one[key] == many[key], key


# ---- signals


@pytest.mark.parametrize("by", ["script", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_sigterm_to_a_launch_of_two_processes(by, faults, data, tmp_path):
    """To the launch script, or to torchrun, which sends it to loader workers too, as the next test does to those of one
    process; the end is bitwise the same."""
    arguments = [
        f"{k}={v}" for k, v in vars(settings(data, tmp_path / "run", epochs=20, workers=1)).items() if v is not None
    ]
    env = environment() | {"GPUS": "2", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command, status = {
        "script": ([str(ROOT / "scripts" / "launch" / "train_one_machine.sh"), *arguments], 0),
        # it calls being stopped a failure
        "torchrun": (torchrun_command(2, "-m", "internimage", "finetune", *arguments), 1),
    }[by]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    assert out.count("asked to stop: saved after step") == 1, out + err
    assert int(re.search(r"saved after step (\d+) of 60", out)[1]) < 60
    assert "error:" not in err and "DataLoader" not in err, err
    torchrun(2, "-m", "internimage", "finetune", *arguments)
    assert losses(tmp_path / "run") == losses(faults[0] / "long")
    assert same_weights(tmp_path / "run", faults[0] / "long")


def test_sigterm_to_the_whole_group_of_processes(data, tmp_path):
    """As `timeout` and systemd send it: a loader's workers get it too, and the run still ends its step and saves."""
    arguments = [f"{k}={v}" for k, v in vars(settings(data, tmp_path, epochs=200, workers=2)).items() if v is not None]
    process = launched.Python(["-m", "internimage", "finetune", *arguments], environment(), new_session=True)
    wait_for_checkpoint(tmp_path, process)
    os.killpg(process.pid, signal.SIGTERM)
    result = process.communicate()
    assert result.returncode == 0 and "asked to stop: saved after step" in result.stdout, result.stdout + result.stderr


FAILING = """
import sys
from internimage.cli import main
from internimage.engine import samples
def fail(self, key):
    raise RuntimeError("a bug")
samples.SeededDataset.__getitem__ = fail
main(sys.argv[1:])
"""


def test_a_bug_does_not_leave_the_process_waiting_for_its_workers(data, tmp_path):
    """The traceback keeps the loader alive to the end, and its workers must go when they are told to."""
    arguments = [f"{k}={v}" for k, v in vars(settings(data, tmp_path, epochs=20, workers=2)).items() if v is not None]
    result = subprocess.run(
        [sys.executable, "-c", FAILING, "finetune", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=environment(),
    )  # fmt: skip
    assert result.returncode == 1 and "RuntimeError: a bug" in result.stderr


def test_a_stop_at_the_end_of_an_epoch_comes_before_validating(data, tmp_path, monkeypatch):
    """The epoch's row is made up for when the run goes on; nothing else differs."""
    finetune(settings(data, tmp_path / "whole", eval_every=1), progress=False)
    config = settings(data, tmp_path / "run", eval_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_validate", lambda *_, **__: pytest.fail("validated after the stop"))
        stop_at(config, 3)
    finetune(config, progress=False)
    assert len(epochs(tmp_path / "run")) == 3 and epochs(tmp_path / "run") == epochs(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


# ---- a full disk, one process


LOGGING = """
import resource, sys
from pathlib import Path
from internimage.engine.log import TrainingLog
folder, board = Path(sys.argv[1]), sys.argv[2] == "tensorboard"
problems = []
log = TrainingLog(folder, [], 0, 10000, 8, tensorboard=board, progress=False, note=problems.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000 if board else 20000, resource.RLIM_INFINITY))
for step in range(1, 3000):
    log.step(step, 1, 0.123456789 * step, 1e-3, 1.0, 0.1)
    if board and step % 100 == 0:
        try:
            log.board.flush()
        except OSError:
            pass
    if problems:
        break
try:
    log.flush()
except Exception as error:
    problems.append(error)
log.close()
print(step, *problems, sep="\\n")
"""


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_logs_on_a_full_disk(tmp_path, kind):
    """The log tells its run, and neither it nor TensorBoard's thread prints a traceback."""
    result = launched.python("-c", LOGGING, tmp_path, kind, variables=environment())
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    step, *problems = result.stdout.splitlines()
    place = "steps.csv" if kind == "csv" else "tensorboard"
    assert int(step) < 2999 and problems
    assert all(f"{place}' could not be written (File too large). Make room" in line for line in problems), problems
    if kind == "csv":
        assert steps(tmp_path)[-1]["step"].isdigit()  # what was written can be read


def test_a_full_disk_at_the_start_and_in_a_report_of_evaluation(data, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = [f"{k}={v}" for k, v in vars(settings(data, tmp_path / "run")).items() if v is not None]
    assert main(["finetune", *arguments]) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_table_of_epochs_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    log = TrainingLog(tmp_path, [], 0, 8, 8, progress=False)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(WriteError, match=r"log\.csv' could not be written \(No space left\)"):
        log.epoch({"epoch": 1}, 1)


# ---- what a run may go on from, and write to


def test_the_output_folder_is_looked_at_before_a_model_is_made(data, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep")
    monkeypatch.setattr(
        "internimage.tasks.classification.task.create_model",
        lambda *_, **__: pytest.fail("a model was made"),
    )
    with pytest.raises(ConfigError, match="is not empty and not ours"):
        finetune(settings(data, tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_does_not_replace_the_model_it_starts_from(data, tmp_path):
    finetune(settings(data, tmp_path / "run", epochs=1), progress=False)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    for start in (
        dict(model=str(tmp_path / "run")),
        dict(model=f"local-dir:{tmp_path / 'run'}"),
        dict(checkpoint=str(tmp_path / "run" / "model.safetensors")),
    ):
        with pytest.raises(ConfigError, match="which this run would replace"):
            finetune(settings(data, tmp_path / "run", overwrite=True, **start), progress=False)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_run_does_not_go_on_with_other_images(data, tmp_path):
    stop_at(settings(data, tmp_path / "run"), 4)
    other = write_noise(tmp_path / "other", train=(9, 9, 8), val=(2, 2, 2))
    with pytest.raises(ConfigError, match=r"trained on 27 images of 3 classes \(0, 1, 2\), here are 26 images"):
        finetune(settings(other, tmp_path / "run"), progress=False)
    (data.parent / "moved").symlink_to(data)
    finetune(settings(data.parent / "moved", tmp_path / "run"), progress=False)


def test_a_run_whose_checkpoints_cannot_be_read_is_not_begun_anew_in_silence(data, tmp_path):
    config = settings(data, tmp_path)
    stop_at(config, 7)
    for path in checkpoint.checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read; resume=false"):
        finetune(config, progress=False)
    assert len(checkpoint.checkpoints(tmp_path / "checkpoints")) == 2


def test_too_many_unreadable_images_are_named_without_a_traceback(data, tmp_path):
    folder = tmp_path / "data"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(12):
            (folder / label / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"^20 images in a row cannot be read; the first is '.*' \(not an image\)$"):
        finetune(settings(folder, tmp_path / "run", workers=1), progress=False)


def test_gradients_that_overflow_at_any_scale_stop_the_run(data, tmp_path, monkeypatch):
    """In float16 an infinite gradient is the scaler's business until there is nothing left to scale."""
    init = trainer.Trainer.__init__

    def patched(self, *arguments):
        init(self, *arguments)
        self.trained[0].register_hook(lambda grad: grad * float("inf"))

    monkeypatch.setattr(trainer.Trainer, "__init__", patched)
    with pytest.raises(trainer.TrainingError, match="the gradient's norm is (nan|inf) in epoch 7, step 19"):
        finetune(settings(data, tmp_path, precision="float16", epochs=10, nan_limit=3), progress=False)
    kept = torch.load(checkpoint.checkpoints(tmp_path / "checkpoints")[0], weights_only=True)
    assert kept["scaler"]["scale"] == 1.0 and kept["progress"]["skipped"] == 2
