# SPDX-License-Identifier: MIT
"""What of a run's folder is believed when the run goes on, and with which images it does."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import arguments, listing, losses, same_weights, settings, steps, stop_at, write_noise
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from internimage.cli import main
from internimage.config import ConfigError, dump
from internimage.data import fingerprint
from internimage.data.datasets import open_dataset
from internimage.engine import checkpoint
from internimage.engine.log import read_steps
from internimage.errors import CheckpointError
from internimage.tasks.classification.finetune import finetune


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), train=(9, 9, 9), val=(2, 2, 2))


# ---- other images


def test_a_run_does_not_go_on_with_images_that_changed(data, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(data, images)
    config = settings(images, tmp_path / "run")
    stop_at(config, 4)
    (images / "train" / "1").rename(images / "train" / "x")
    (images / "train" / "2").rename(images / "train" / "1")
    (images / "train" / "x").rename(images / "train" / "2")
    with pytest.raises(ConfigError, match=r"other images: .* in 2 classes \(1, 2\): give it the same images") as error:
        finetune(config, progress=False)
    assert "\n" not in str(error.value)
    shutil.rmtree(images)
    shutil.copytree(data, images)  # the same ones, at another time
    os.utime(images / "train" / "0" / "0.png", (0, 0))
    finetune(config, progress=False)


def test_a_run_of_an_older_version_goes_on(data, copy, whole):
    """Its checkpoints have no fingerprint of the images, and its settings no first line."""
    for path in checkpoint.checkpoints(copy / "checkpoints"):
        state = checkpoint.read_file(path)[0]
        del state["data"]["images"]
        torch.save(state, path)
    (copy / "finetune.yaml").write_text(dump(settings(data, copy)))
    finetune(settings(data, copy), progress=False)
    assert same_weights(copy, whole) and losses(copy) == losses(whole)


def test_fingerprints(data, tmp_path):
    def of(folder):
        return fingerprint.fingerprint(open_dataset(folder, split=""))

    images = tmp_path / "images"
    shutil.copytree(data / "train", images)
    base = of(images)
    assert base == of(data / "train") and len(base) == 3
    (images / "1" / "0.png").write_bytes((images / "1" / "0.png").read_bytes() + b"\0")
    assert [a == b for a, b in zip(base, of(images))] == [True, False, True]
    (images / "2" / "0.png").rename(images / "2" / "00.png")
    assert [a == b for a, b in zip(base, of(images))] == [True, False, False]
    before = fingerprint._CHUNK
    try:  # a file server: threads, and in the same order
        fingerprint._CHUNK = 2
        clock = iter([0.0, 1.0] * 9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint.time, "perf_counter", lambda: next(clock))
            assert of(data / "train") == base
    finally:
        fingerprint._CHUNK = before
    assert fingerprint.fingerprint([1, 2]) is None


@pytest.mark.parametrize("kind", ["one tar", "a tar a class"])
def test_fingerprints_of_tar_files(data, tmp_path, kind):
    def of(name, more):
        source, folder = tmp_path / f"{name}-images", tmp_path / name
        shutil.copytree(data / "train", source)
        (source / "1" / "0.png").write_bytes((source / "1" / "0.png").read_bytes() + more)
        folder.mkdir()
        if kind == "one tar":
            return fingerprint.fingerprint(open_dataset(shutil.make_archive(str(folder / "all"), "tar", source)))
        for label in "012":
            shutil.make_archive(str(folder / label), "tar", source, label)
        return fingerprint.fingerprint(SimpleNamespace(reader=ReaderImageInTar(str(folder), cache_tarinfo=False)))

    assert [x == y for x, y in zip(of("a", b""), of("b", b"\0"))] == [True, False, True]


# ---- state that cannot be believed


def state_with(path, change):
    state = checkpoint.read_file(path)[0]
    changed = change(state)
    torch.save(state if changed is None else changed, path)


GARBAGE = {
    "no progress": lambda state: state.pop("progress") and None,
    "no data": lambda state: state.pop("data") and None,
    "a list": lambda state: [1, 2],
    "other progress": lambda state: state["progress"].update(speed=3),
    "text for a number": lambda state: state["progress"].update(skipped="many"),
    "a negative step": lambda state: state["progress"].update(skipped=-1),
    "rows of nothing": lambda state: state["progress"].update(epochs=[1]),
    "another step": lambda state: state["progress"].update(step=5),
    "weights of another model": lambda state: state["model"].update({"head.weight": torch.ones(1)}),
    "numbers for weights": lambda state: state.update(model={"head.weight": 3}),
    "no weights": lambda state: state.update(model=None),
    "another optimizer": lambda state: state.update(optimizer={"state": {}, "param_groups": 3}),
    "no scheduler": lambda state: state.update(schedule=[]),
    "odd draws": lambda state: state["random"].update(python=(3, (1, 2), None)),
    "odd images": lambda state: state["data"].update(images=3),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_checkpoint_with_garbage_is_passed_over(data, copy, whole, caplog, name):
    state_with(checkpoint.checkpoints(copy / "checkpoints")[0], GARBAGE[name])
    finetune(settings(data, copy), progress=False)
    (line,) = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert "step-000000007.pt' cannot be read and is skipped: it" in line and "\n" not in line
    assert same_weights(copy, whole)


@pytest.mark.parametrize("content", [b"nothing", b"", b"PK\3\4" + bytes(100), b"\x80\4cos\nsystem\n."], ids=range(4))
def test_damaged_checkpoints_get_a_reason_of_ours(data, copy, caplog, content):
    for path in checkpoint.checkpoints(copy / "checkpoints"):
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read; resume=false"):
        finetune(settings(data, copy), progress=False)
    assert caplog.text.count("bytes are not a complete checkpoint") == 2
    assert "weights_only" not in caplog.text and "torch.load" not in caplog.text


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"{[", "it must be flat"),
        (b"\xff\xfe\0", "not text in UTF-8"),
        (b"", "it must hold a mapping of keys to values, got nothing"),
        (b"- 1\n", "got a list"),
        (b"2020-99-99", "got a single value"),
        (b"[" * 5000, "it must be flat"),
        (b"lr: many\n", "'lr' must be a number"),
    ],
    ids=range(7),
)
def test_damaged_settings_are_one_line(data, copy, capsys, content, reason):
    (copy / "finetune.yaml").write_bytes(content)
    before = listing(copy)
    assert main(arguments(settings(data, copy))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "finetune.yaml' cannot be read (" in line and reason in line and "so the run cannot resume" in line
    assert listing(copy) == before


@pytest.mark.parametrize("content", [b"\0\xff garbage\n,,\n", b"step,epoch\n1,1\n"], ids=range(2))
def test_a_damaged_table_of_steps_loses_its_rows_alone(data, copy, whole, content):
    rows = (copy / "steps.csv").read_bytes()
    (copy / "steps.csv").write_bytes(rows + b"8,3,\0garbage,0,0,0\n9,x\n7,3,1.0,1,1,1,1,1\n")
    assert len(read_steps(copy)) == 7
    (copy / "steps.csv").write_bytes(content)
    finetune(settings(data, copy), progress=False)
    assert [row["step"] for row in steps(copy)] == ["8", "9"] and same_weights(copy, whole)
