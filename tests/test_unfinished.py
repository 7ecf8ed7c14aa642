# SPDX-License-Identifier: MIT
"""Runs that end before their end: Ctrl-C, training that diverges, data that does not do."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from multiprocessing import resource_sharer

import pytest
import torch
from runs import ROOT, environment, listing, same_weights, settings, wait_for_checkpoint, write_noise

from internimage import locks
from internimage.cli import main
from internimage.data.images import DataError
from internimage.data.workers import init_worker_signals
from internimage.engine import checkpoint, trainer
from internimage.engine import run as engine_run
from internimage.engine.finite import NotFiniteError
from internimage.engine.run_folder import UNFINISHED, is_finished, prepare_output
from internimage.tasks.classification import task as classification
from internimage.tasks.classification.finetune import finetune
from internimage.tasks.classification.task import ClassificationTask, open_data

posix = pytest.mark.skipif(os.name != "posix", reason="signals, modes and POSIX locks")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), train=(9, 9, 9), val=(2, 2, 2))


def arguments(config):
    return ["finetune", *(f"{k}={v}" for k, v in vars(config).items() if v is not None)]


# ---- Ctrl-C


def interrupt_in(monkeypatch, owner, name, when=lambda *_: True):
    """Ctrl-C as a function is called."""
    before = getattr(owner, name)

    def patched(*arguments, **keywords):
        if when(*arguments):
            raise KeyboardInterrupt
        return before(*arguments, **keywords)

    monkeypatch.setattr(owner, name, patched)


@pytest.mark.parametrize(
    "place, message",
    [
        ("model", "interrupted before training began; nothing was changed"),
        ("step 2", "interrupted before the first checkpoint; the same command starts over"),
        ("step 5", "interrupted; the same command resumes after step 3 of 9"),
        ("checkpoint", "interrupted; the same command resumes after step 3 of 9"),
        ("model's file", "interrupted; the same command resumes after step 9 of 9"),
        ("report", "interrupted; the model is in '{run}', and the same command finishes the run"),
        ("end", "interrupted; training is done, and the result is in"),
    ],
)
def test_an_interrupt_says_what_the_same_command_does(data, tmp_path, monkeypatch, capsys, place, message):
    run = tmp_path / "run"
    if place == "model":
        interrupt_in(monkeypatch, ClassificationTask, "create_model")
    elif place.startswith("step"):
        interrupt_in(monkeypatch, trainer.Trainer, "_step", lambda self, *_: self.progress.step + 1 == int(place[-1]))
    elif place == "checkpoint":  # inside of torch's archive writer, which makes another error of it
        save = torch.save
        saved = []

        class Interrupted:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                if len(saved) == 2:
                    raise KeyboardInterrupt
                return self.file.write(data)

            def flush(self):
                self.file.flush()

        def patched(state, file):
            saved.append(state)
            save(state, Interrupted(file))

        monkeypatch.setattr(torch, "save", patched)
    elif place == "model's file":
        interrupt_in(monkeypatch, ClassificationTask, "save")
    elif place == "report":
        interrupt_in(monkeypatch, engine_run, "write_report")
    else:
        interrupt_in(monkeypatch, locks, "_release", lambda path, _: path.parent == run)
    config = settings(data, run, report=True)
    assert main(arguments(config)) == 130
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith(message.format(run=run)), err
    assert not [line for line in err if "error" in line or "Traceback" in line]
    if run.exists():
        assert not list((run / "checkpoints").glob(".partial*"))
    if place in ("checkpoint", "model's file", "report"):
        monkeypatch.undo()
        assert main(arguments(config)) == 0
        assert (run / "report.html").is_file()


# ---- what comes after the last step


@pytest.mark.parametrize(
    "where, error",
    [
        ("evaluation", KeyboardInterrupt()),
        ("evaluation", RuntimeError("a worker was killed")),
        ("evaluation", MemoryError()),
        ("report", KeyboardInterrupt()),
        ("report", SystemExit(3)),
        ("report", MemoryError()),
        ("report", UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_nothing_after_the_last_step_costs_the_model(data, whole, tmp_path, monkeypatch, capsys, where, error):
    run, config = tmp_path / "run", settings(data, tmp_path / "run", report=True)
    shutil.copytree(whole, run)  # a run that stands before its last evaluation
    (run / "finetune.yaml").write_text((run / "finetune.yaml").read_text().replace(str(whole), str(run)))
    for name in ("model.safetensors", "config.json"):
        (run / name).unlink()

    def fail(*_, **__):
        assert same_weights(run, whole) and not is_finished(run)
        raise error

    monkeypatch.setattr(trainer.Trainer, "_step", lambda *_: pytest.fail("trained"))
    with monkeypatch.context() as patch:
        owner = (classification, "evaluate") if where == "evaluation" else (engine_run, "write_report")
        patch.setattr(*owner, fail)
        if isinstance(error, Exception):  # reported, and that is all
            assert main(arguments(config)) == 1
            what = "the validation images were not evaluated" if where == "evaluation" else "could not be written"
            err = capsys.readouterr().err
            assert what in err and "Traceback" not in err and is_finished(run)
        else:
            with contextlib.suppress(SystemExit):
                assert main(arguments(config)) == 130
            assert same_weights(run, whole) and not is_finished(run)
    assert same_weights(run, whole)
    if not is_finished(run):  # the same command does what is left
        assert main(arguments(settings(data, run, report=True, lr=0.5))) == 2
        assert "holds an unfinished run of other settings" in capsys.readouterr().err
        assert main(arguments(config)) == 0
        assert (run / "report.html").is_file() and is_finished(run) and not (run / UNFINISHED).exists()
    assert main(arguments(config)) == 2
    assert "holds an earlier result; overwrite=true replaces it" in capsys.readouterr().err


def test_a_model_that_turns_out_to_be_none_goes_again(data, whole, tmp_path, monkeypatch, capsys):
    """Its weights are finite, and its outputs are not."""

    def fail(*_, **__):
        assert (tmp_path / "run" / "model.safetensors").exists()
        raise NotFiniteError("an output is nan")

    monkeypatch.setattr("internimage.tasks.classification.task.evaluate", fail)
    assert main(arguments(settings(data, tmp_path / "run", epochs=1))) == 2
    assert "No model was written; the checkpoints stay" in capsys.readouterr().err
    assert listing(tmp_path / "run") == ["checkpoints", "checkpoints/step-000000003.pt", "finetune.yaml", "steps.csv"]


def test_an_unfinished_result_without_checkpoints_is_a_result(data, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints")
    (run / UNFINISHED).touch()
    assert main(arguments(settings(data, run))) == 2
    assert "holds an earlier result; overwrite=true replaces it" in capsys.readouterr().err
    prepare_output(settings(data, run, overwrite=True))
    assert listing(run) == ["finetune.yaml"]


@posix
def test_ctrl_c_with_loader_workers_is_one_line(data, tmp_path):
    """The whole way: the terminal sends the signal to the workers too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "internimage", *arguments(settings(data, tmp_path, epochs=500, workers=2))], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell ignores in what runs with &
    )  # fmt: skip
    wait_for_checkpoint(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    last = int(checkpoint.checkpoints(tmp_path / "checkpoints")[0].stem[5:])
    assert f"interrupted; the same command resumes after step {last} of 1500" in err and "Traceback" not in err, err


def _share_a_descriptor(pipe):
    init_worker_signals(0)
    with open(os.devnull) as file:
        pipe.send(resource_sharer.DupFd(file.fileno()))
        pipe.recv()


@posix
def test_a_worker_whose_reader_leaves_in_the_middle_prints_nothing(capfd):
    """Ctrl-C can hit the process that loads while it takes over a tensor's descriptor: the worker's thread then sees a
    connection that ends before the handshake."""
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_share_a_descriptor, args=(there,))
    worker.start()
    shared = here.recv()
    with socket.socket(socket.AF_UNIX) as leaving:
        leaving.connect(shared._id[0])
    os.close(shared.detach())  # the next connection is served after the one that left
    here.send(None)
    worker.join()
    assert worker.exitcode == 0 and capfd.readouterr().err == ""


# ---- runs that diverged


@pytest.mark.parametrize("sets", [{"eval_every": 0}, {"eval_every": 1}, {"ema_decay": 0.9}], ids=str)
def test_a_diverged_run_is_not_saved_as_finished(data, tmp_path, capsys, monkeypatch, sets):
    step = trainer.Trainer._step

    def patched(self, *arguments):
        result = step(self, *arguments)
        if self.progress.step == 6:
            for name in ("patch_embed.conv1.weight", "head.weight"):
                for model in {self.model, self.result}:
                    model.get_parameter(name).data.view(-1)[:2] = float("nan")
        return result

    monkeypatch.setattr(trainer.Trainer, "_step", patched)
    assert main(arguments(settings(data, tmp_path, **sets))) == 2
    err = capsys.readouterr().err
    where = "2 elements of 'patch_embed.conv1.weight', and some in 1 other tensors,"
    assert f"error: training diverged: {where} are not finite after epoch 2. A smaller lr than 0.003" in err
    assert "Traceback" not in err and not (tmp_path / "model.safetensors").exists()
    assert len(checkpoint.checkpoints(tmp_path / "checkpoints")) == 2
    monkeypatch.undo()
    assert main(arguments(settings(data, tmp_path, **sets))) == 2  # it would go on from there
    assert "training diverged" in capsys.readouterr().err


def test_a_buffer_that_is_infinite_by_intent_is_no_divergence(data, tmp_path, monkeypatch):
    init = trainer.Trainer.__init__

    def patched(self, task, world, model, *arguments):
        model.register_buffer("mask", torch.full((2,), -torch.inf))
        init(self, task, world, model, *arguments)

    monkeypatch.setattr(trainer.Trainer, "__init__", patched)
    finetune(settings(data, tmp_path, epochs=1), progress=False)


# ---- messages about the data


def test_classes_that_differ_are_counted_and_not_listed(tmp_path):
    for split, count, extra in (("train", 1000, "cat"), ("val", 998, "dog")):
        for name in [*map(str, range(count)), extra]:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").touch()
    with pytest.raises(DataError) as error:
        open_data(settings(tmp_path, "run", eval_every=1))
    message = str(error.value)
    assert message.endswith("have different classes: only here: 998, 999, cat; only there: dog") and len(message) < 600


def test_a_batch_that_is_too_large_says_what_fits(data):
    for more, fitting in (({}, 27), ({"accumulate": 4}, 24), ({"accumulate": 5, "mixup": 0.1}, 20)):
        with pytest.raises(DataError, match=rf"batch_size=40 is more than the 27 .*: set batch_size={fitting} or less"):
            open_data(settings(data, "run", batch_size=40, **more))
