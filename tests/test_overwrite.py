# SPDX-License-Identifier: MIT
"""convert --overwrite: it replaces the model that convert wrote, and nothing that is not ours."""

import json
import logging
import os
import re
import shutil
import signal

import formats
import pytest
import timm
import torch
from runs import same_weights

from internimage.atomic import JOURNAL
from internimage.cli import main
from internimage.convert import folder as folders
from internimage.convert.convert import check_folder, convert
from internimage.convert.detect import ConvertError
from internimage.errors import CheckpointError
from internimage.locks import LOCK_FILE, LockedError, hold
from internimage.weights.readers import open_weights

posix = pytest.mark.skipif(os.name != "posix", reason="forks")
FILES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights of a small model, and other ones."""
    folder = tmp_path_factory.mktemp("source")
    for name, seed in (("a.pth", 1), ("b.pth", 2)):
        torch.manual_seed(seed)
        formats.save_torch(folder / name, timm.create_model("internimage_atto", num_classes=3).state_dict())
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The same weights whole, and in shards."""
    folder = tmp_path_factory.mktemp("converted")
    convert(source / "a.pth", folder / "whole", model="internimage_atto")
    convert(source / "b.pth", folder / "shards", model="internimage_atto", shard_size="1MB")
    assert len([name for name in os.listdir(folder / "shards") if "-of-" in name]) > 2
    return folder


@pytest.fixture
def out(converted, tmp_path):
    shutil.copytree(converted / "whole", tmp_path / "out")
    return tmp_path / "out"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def overwrite(source, out, **more):
    return convert(source, out, model="internimage_atto", overwrite=True, **more)


# ---- what is ours


@pytest.mark.parametrize(
    "config",
    [None, "{}", "[]", "{", '{"architecture": "resnet18"}', '{"internimage": 3}', '{"internimage": {}}', "[" * 9**5],
    ids=range(8),
)  # fmt: skip
def test_a_folder_that_is_not_ours_is_left_alone(source, tmp_path, capsys, config):
    project = tmp_path / "project"
    for name in (".git/config", "train.py", "model.safetensors", "README.md", *(["config.json"] if config else [])):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(config if name == "config.json" else "mine")
    before = contents(project)
    for more in ([], ["--overwrite"]):
        assert main(["convert", str(source / "a.pth"), str(project), "--model", "internimage_atto", *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"error: the folder '{project}' is not empty" in line and "name another" in line
        assert ("its config.json does not say that convert has written it" in line) == bool(config)
        assert ("overwrite replaces nothing there: remove it yourself" in line) == bool(more)
    assert contents(project) == before and os.listdir(tmp_path) == ["project"]


def test_a_folder_of_an_older_version_says_nothing_of_whose_it_is(source, out, capsys):
    config = json.loads((out / "config.json").read_text())
    del config[folders.MARK]
    (out / "config.json").write_text(json.dumps(config))
    before = contents(out)
    assert main(["convert", str(source / "b.pth"), str(out), "--model", "internimage_atto", "--overwrite"]) == 2
    assert "overwrite replaces nothing there: remove it yourself, or name another" in capsys.readouterr().err
    assert contents(out) == before


def test_a_run_is_not_a_conversion(source, tmp_path):
    from internimage.engine.create import data_config
    from internimage.models.timm_folder import save_model

    model = timm.create_model("internimage_atto", num_classes=3)
    save_model(model, tmp_path, ["a", "b", "c"], data_config(model))
    before = contents(tmp_path)
    with pytest.raises(ConvertError, match="is not empty, and its config.json does not say"):
        overwrite(source / "a.pth", tmp_path)
    with pytest.raises(ConvertError, match=rf"the source '{tmp_path}' is in '{tmp_path}', which the result would"):
        overwrite(tmp_path, tmp_path)
    assert contents(tmp_path) == before


def test_other_files_stay_and_stale_weights_go(source, out, converted):
    mine = {".git/config", "notes.txt", "LICENSE", "model.safetensors.bak", "sub/model.safetensors", "optimizer.pt"}
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    result = overwrite(source / "b.pth", out, shard_size="1MB")
    shards = {name for name in os.listdir(converted / "shards") if name.startswith("model")}
    assert set(result.files) == shards | {"config.json", "README.md"}
    assert set(contents(out)) == mine | set(result.files)
    assert all((out / name).read_text() == name for name in mine)
    result = overwrite(source / "a.pth", out)
    assert set(contents(out)) == mine | FILES and set(result.files) == FILES
    assert same_weights(out, converted / "whole")
    check_folder(out)


def test_an_edited_card_stays(source, out, caplog):
    first = (out / "README.md").read_text()
    overwrite(source / "b.pth", out)
    assert (out / "README.md").read_text().replace("b.pth", "a.pth") == first and not caplog.text
    (out / "README.md").write_text("my own words")
    result = overwrite(source / "a.pth", out)
    assert (out / "README.md").read_text() == "my own words" and set(result.files) == FILES - {"README.md"}
    assert re.search(r"README.md' was not written by convert or was edited since, and stays as it is", caplog.text)
    overwrite(source / "a.pth", out)
    assert (out / "README.md").read_text() == "my own words"


def test_the_mark_is_no_trouble_to_timm_and_transformers(out):
    from transformers import AutoModelForImageClassification

    timm.create_model(f"local-dir:{out}", pretrained=True)
    AutoModelForImageClassification.from_pretrained(str(out))


# ---- the source


def test_a_source_in_the_destination_is_not_replaced(source, out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "far").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "far" / name).symlink_to(out / name)
    before = contents(out)
    for where in (out, out / "model.safetensors", tmp_path / "link", tmp_path / "far", tmp_path / "link" / "README.md"):
        with pytest.raises(ConvertError, match="which the result would replace: name another"):
            overwrite(where, out)
        with pytest.raises(ConvertError, match="which the result would replace: name another"):
            overwrite(where, tmp_path / "link")
    assert contents(out) == before


def test_a_source_beside_the_replaced_files_is_fine(source, out):
    """In the folder, and under a name that is not ours; and a result inside of the source's folder."""
    shutil.copy(source / "b.pth", out / "b.pth")
    (out / "b.pth").rename(out / "weights.pth")
    overwrite(out / "weights.pth", out)
    assert (out / "weights.pth").is_file()
    convert(out, out / "inner", dtype=torch.bfloat16)
    assert set(FILES) == set(os.listdir(out / "inner")) and (out / "model.safetensors").is_file()


# ---- links, locks, failures


def test_links_to_folders_stay_links(source, out, tmp_path):
    (tmp_path / "there").symlink_to(out)
    (tmp_path / "new").symlink_to("far/away")
    overwrite(source / "b.pth", tmp_path / "there")
    convert(source / "b.pth", tmp_path / "new", model="internimage_atto")
    assert (tmp_path / "there").is_symlink() and (tmp_path / "new").is_symlink()
    assert same_weights(out, tmp_path / "far" / "away")


def test_two_conversions_into_one_folder(source, out):
    before = contents(out)
    with hold(out), pytest.raises(LockedError, match="another run is writing to"):
        overwrite(source / "b.pth", out)
    assert contents(out) == before
    assert LOCK_FILE not in os.listdir(out)


def failing(after, failure):
    """os.replace that fails once after so many files were exchanged."""
    replace, calls = os.replace, []

    def patched(source, target):
        if os.path.dirname(source) != os.path.dirname(target):  # or a text gets its name
            calls.append(target)
            if len(calls) == after + 1:
                raise failure
        replace(source, target)

    return patched


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_what_fails_in_between_is_taken_back(source, out, monkeypatch, failure, after):
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    monkeypatch.setattr(os, "replace", failing(after, failure))
    with pytest.raises(ConvertError if isinstance(failure, OSError) else KeyboardInterrupt):
        overwrite(source / "b.pth", out)
    assert contents(out) == before and set(os.listdir(out)) == FILES | {"notes.txt"}


def test_a_failure_after_a_kill_leaves_the_folder_ours(source, out, monkeypatch):
    """config.json had gone already, and the journal alone says whose the folder is."""
    (out / JOURNAL).write_text('{"cards": []}')
    (out / "config.json").unlink()
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    monkeypatch.setattr(os, "replace", failing(1, OSError(5, "Input/output error")))
    with pytest.raises(ConvertError, match="cannot be written"):
        overwrite(source / "b.pth", out)
    assert contents(out).keys() == before.keys()
    monkeypatch.undo()
    overwrite(source / "b.pth", out)
    assert set(os.listdir(out)) == FILES | {"notes.txt"}
    check_folder(out)


def loads(folder):
    """What a folder loads as: the digest of its weights, or None where it is refused."""
    try:
        check_folder(folder)
    except CheckpointError:
        return None
    return {key: entry.read() for key, entry in open_weights(folder).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def dying(count):
    """os.replace whose process is killed instead of the call after so many."""
    replace, calls = os.replace, []

    def patched(source, target):
        calls.append(source)
        if len(calls) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    return patched


@posix
@pytest.mark.parametrize("start, end", [("whole", "shards"), ("shards", "whole")])
def test_killed_at_any_place_the_next_command_ends_it(converted, tmp_path, start, end, caplog):
    """Also one that is refused. Until then it is the old one, the new one, or none that loads."""
    caplog.set_level(logging.ERROR)
    old, new = loads(converted / start), loads(converted / end)
    states = []

    def convert_to(here, count=1000):
        with folders.staging(here, overwrite=True) as staged:
            shutil.copytree(converted / end, staged, dirs_exist_ok=True)
            os.replace = dying(count)
            folders.place(staged, here)

    for count in range(30):
        here = tmp_path / str(count)
        shutil.copytree(converted / start, here)
        (here / "notes.txt").write_text("mine")
        child = os.fork()
        if not child:
            try:
                convert_to(here, count)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        found = loads(here)
        if found is None:
            states.append("none")
            assert not (here / "config.json").exists()
            entries = None
            try:  # weights alone, without the configuration
                entries = open_weights(here)
            except (CheckpointError, FileNotFoundError):
                pass
            if entries is not None:
                tensors = {key: entry.read() for key, entry in entries.items()}
                assert equal(tensors, old) or equal(tensors, new), count
        else:
            states.append("old" if equal(found, old) else "new")
            assert equal(found, old if states[-1] == "old" else new)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        with pytest.raises(ConvertError, match="holds a model; overwrite replaces it"):
            folders.check_destination(here, overwrite=False)
        mended = "old" if count == 0 else "new"  # what it was going to do is noted by the first rename
        assert equal(loads(here), old if mended == "old" else new)
        files = os.listdir(converted / (start if mended == "old" else end))
        assert set(os.listdir(here)) == {*files, "notes.txt"}
    assert states[0] == "old" and states[-1] == "new" and "none" in states
    assert states == sorted(states, key=["old", "none", "new"].index)


def test_a_folder_of_an_older_version_that_was_killed_is_made_whole(source, out):
    """Its journal says whose the folder is, and not what was going to be done."""
    (out / JOURNAL).write_text(
        json.dumps({"cards": [json.loads((out / "config.json").read_text())["internimage"]["card"]]})
    )
    (out / ".partial-replaced-01234567").mkdir()
    (out / "config.json").rename(out / ".partial-replaced-01234567" / "config.json")
    with pytest.raises(ConvertError, match="overwrite replaces it"):
        folders.check_destination(out, overwrite=False)
    assert (out / ".partial-replaced-01234567" / "config.json").exists()
    overwrite(source / "b.pth", out)
    assert set(os.listdir(out)) == FILES
    check_folder(out)
