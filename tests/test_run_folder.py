# SPDX-License-Identifier: MIT
"""The folder of a run: what overwriting removes, who may write to it, and the modes of what is in it."""

import contextlib
import errno
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time

import pytest
from runs import arguments, listing, settings, stop_at, write_noise

from internimage import locks
from internimage.cli import main
from internimage.config import ConfigError, dump
from internimage.engine import checkpoint, trainer
from internimage.engine.run_folder import check_output, prepare_output
from internimage.locks import LOCK_FILE, LockedError, check_free, hold
from internimage.tasks.classification.finetune import finetune

posix = pytest.mark.skipif(os.name != "posix", reason="signals, modes and POSIX locks")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), train=(9, 9, 9), val=(2, 2, 2))


# ---- what overwriting removes


def test_overwriting_replaces_the_run_and_keeps_what_others_put_there(data, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    mine = ["notes.txt", "checkpoints/best.pt", "checkpoints/step-1.pt", "bad-batches/notes.txt", "tensorboard/x/mine"]
    ours = [
        "bad-batches/step-000000004-process-1.pt", "tensorboard/events.out.tfevents.1.host.2.0",
        "checkpoints/step-000000001/__0_0.distcp", "checkpoints/step-000000001/.metadata", ".partial-0123abcd/x",
    ]  # fmt: skip
    for name in mine + ours:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    prepare_output(settings(data, run, overwrite=True))
    files = [name for name in listing(run) if not (run / name).is_dir()]
    assert files == sorted([*mine, "finetune.yaml"])
    assert not (run / ".partial-0123abcd").exists() and not (run / "checkpoints" / "step-000000001").exists()
    assert all((run / name).read_text() == name for name in mine)


def test_what_others_put_into_a_sharded_checkpoint_stays(tmp_path):
    sharded = tmp_path / "step-000000001"
    sharded.mkdir()
    for name in ("__1_0.distcp", ".metadata", "state.pt", "thoughts.txt"):
        (sharded / name).touch()
    checkpoint.remove_all(tmp_path)
    assert listing(tmp_path) == ["not-of-step-000000001", "not-of-step-000000001/thoughts.txt"]
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"resume": False}], ids=["plain", "overwrite", "anew"])
def test_a_project_with_a_recipe_of_that_name_is_not_a_run(data, whole, tmp_path, more):
    """A recipe of one's own, and a run's settings that were copied to start from."""
    for name, text in {
        "recipe": f"data: {data}\nlr: 0.1  # mine\n",
        "copied": (whole / "finetune.yaml").read_text(),
        "copied of an older version": dump(settings(data, whole)),
        "damaged": "{[\0",
    }.items():
        project = tmp_path / name
        for file in ("checkpoints/step-000000001.pt", ".git/config", "config.json", "log.csv"):
            (project / file).parent.mkdir(parents=True, exist_ok=True)
            (project / file).write_text("mine")
        if not more or more.get("overwrite"):
            shutil.rmtree(project / "checkpoints")
        (project / "finetune.yaml").write_text(text)
        before = listing(project)
        with pytest.raises(ConfigError, match="is not one that finetune has written for this folder") as error:
            check_output(settings(data, project, **more))
        assert "\n" not in str(error.value)
        assert listing(project) == before and (project / "finetune.yaml").read_text() == text


def test_a_run_of_an_older_version_is_known_by_its_settings(data, whole, tmp_path):
    """Its first line did not say whose it is, but no recipe has all settings as yaml writes them."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "finetune.yaml").write_text(dump(settings(data, run)))
    prepare_output(settings(data, run, overwrite=True))
    assert listing(run) == ["finetune.yaml"]


def test_a_link_to_a_folder_stays_a_link(data, tmp_path):
    (tmp_path / "link").symlink_to("far")
    stop_at(settings(data, tmp_path / "link"), 1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "finetune.yaml").is_file()
    check_output(settings(data, tmp_path / "link"))


def test_what_a_killed_process_left_is_no_reason_to_refuse_a_folder(data, tmp_path):
    (tmp_path / LOCK_FILE).write_text("process 1 on somewhere since long\n")
    (tmp_path / ".partial-finetune.yaml-0123abcd").touch()
    stop_at(settings(data, tmp_path), 1)
    assert listing(tmp_path) == ["checkpoints", "checkpoints/step-000000001.pt", "finetune.yaml", "steps.csv"]


# ---- one run at a time


@contextlib.contextmanager
def held_elsewhere(folder):
    """By another process, which is killed at the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            locks._held.clear()  # this process's
            with hold(folder):
                os.write(writer, b"held")
                time.sleep(600)
        except LockedError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    try:
        yield child, os.read(reader, 1000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


@posix
def test_a_second_run_is_refused_and_a_killed_one_blocks_nobody(data, copy, capsys, monkeypatch):
    with held_elsewhere(copy) as (pid, said):
        assert said == "held"
        before = listing(copy)
        with monkeypatch.context() as patch:
            patch.setattr(
                "internimage.tasks.classification.task.create_model",
                lambda *_, **__: pytest.fail("late"),
            )
            assert main(arguments(settings(data, copy))) == 2
        err = capsys.readouterr().err
        assert re.search(rf"error: another run is writing to '.*run': process {pid} on \S+ since 20\d\d-", err)
        with pytest.raises(LockedError, match=f"process {pid} on"), hold(copy):
            pytest.fail("two have it")
        assert listing(copy) == before
    assert (copy / LOCK_FILE).exists()
    finetune(settings(data, copy), progress=False)
    assert not (copy / LOCK_FILE).exists()


def test_two_that_begin_at_once_in_a_new_folder(data, tmp_path, monkeypatch):
    """Both have looked at the folder; one of them gets it, and the other writes nothing."""
    made = trainer.Trainer.__init__

    def patched(self, *arguments):
        made(self, *arguments)
        config = arguments[0].config
        if config.lr != 0.5:
            monkeypatch.setattr(trainer.Trainer, "run", run_other)

    run = trainer.Trainer.run

    def run_other(self, stop, progress=True):
        monkeypatch.setattr(trainer.Trainer, "run", run)
        module = sys.modules["internimage.engine.run"]
        monkeypatch.setattr(module, "check_free", lambda folder: None)
        monkeypatch.setattr(module, "check_output", lambda config: False)
        with pytest.raises(LockedError, match="another run is writing to"):
            finetune(settings(data, tmp_path / "run", lr=0.5), progress=False)
        return run(self, stop, progress)

    monkeypatch.setattr(trainer.Trainer, "__init__", patched)
    finetune(settings(data, tmp_path / "run"), progress=False)
    assert "lr: 0.003" in (tmp_path / "run" / "finetune.yaml").read_text()


@posix
def test_threads_of_one_process_exclude_each_other(tmp_path):
    """The system's locks are of a process, and a look at the file would release them."""
    (tmp_path / "link").symlink_to(tmp_path)
    with hold(tmp_path):
        for take in (lambda: check_free(tmp_path / "link"), lambda: hold(tmp_path / "link").__enter__()):
            failures = []

            def work(take=take, failures=failures):
                try:
                    take()
                except LockedError as error:
                    failures.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(20)
            assert len(failures) == 1
        with held_elsewhere(tmp_path) as (_, said):  # and no look has released the lock
            assert said.startswith("another run is writing to")
    assert os.listdir(tmp_path) == ["link"]
    with hold(tmp_path):
        check_free(tmp_path.parent)


@posix
def test_a_file_that_was_removed_between_opening_and_locking_is_no_lock(tmp_path, monkeypatch):
    """Its holder ended just then; the next process locks a new file of that name."""
    locked = locks._try_lock
    calls = []

    def patched(file):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        return locked(file)

    monkeypatch.setattr(locks, "_try_lock", patched)
    with hold(tmp_path):
        assert len(calls) == 2 and f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()


@posix
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog, code):
    def lockf(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    check_free(tmp_path)
    with hold(tmp_path):
        assert "has no locks: nothing keeps a second run from writing there" in caplog.text
    assert os.listdir(tmp_path) == []


# ---- modes


@posix
def test_everything_in_the_folder_has_the_umask_s_mode(data, tmp_path):
    before = os.umask(0o027)
    try:
        config = settings(data, tmp_path / "a" / "run", epochs=1, report=True, eval_every=1)
        with pytest.MonkeyPatch.context() as patch:
            place = trainer.Trainer._to_device

            def patched(self, batch, step):
                images, targets = place(self, batch, step)
                return (images * float("nan") if step == 1 else images), targets

            patch.setattr(trainer.Trainer, "_to_device", patched)
            finetune(config, progress=False)
        assert main(["convert", str(tmp_path / "a" / "run"), str(tmp_path / "converted")]) == 0
    finally:
        os.umask(before)
    there = [*(tmp_path / "a").rglob("*"), *(tmp_path / "converted").rglob("*"), tmp_path / "converted"]
    assert {"model.safetensors", "report.html", "checkpoints", "bad-batches", "README.md"} <= {x.name for x in there}
    wrong = {x.name: oct(x.stat().st_mode) for x in there if stat.S_IMODE(x.stat().st_mode) & 0o777 != (
        0o750 if x.is_dir() else 0o640
    )}  # fmt: skip
    assert not wrong
